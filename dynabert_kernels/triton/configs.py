"""Tile shapes per problem class, as data: which one runs, and what it was measured at."""

from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["rows", "columns"]


@dataclass(frozen=True)
class LinearConfig:
    """How one matrix product is cut up; see `gemm`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptors: bool = False
    programs_per_sm: int = 0  # 0: one program per tile; else a persistent grid
    subtiles: int = 1
    flatten: bool = False
    split_k: int = 1

    @property
    def name(self) -> str:
        """Short label for benchmark rows."""
        label = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"
        label += " desc" if self.descriptors else " ptr"
        if self.programs_per_sm:
            label += f" persistent{self.programs_per_sm}"
        if self.flatten:
            label += " flat"
        if self.subtiles > 1:
            label += f" sub{self.subtiles}"
        if self.group_m != 8:
            label += f" g{self.group_m}"
        if self.split_k > 1:
            label += f" split{self.split_k}"
        return label


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is cut up; `block_keys` is ignored where a sequence fits one tile."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Short label for benchmark rows."""
        return f"{self.block_queries}x{self.block_keys} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True)
class NormConfig:
    """Rows per program and warps of the row kernel."""

    rows: int
    num_warps: int


def _divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def linear_config(
    form: Form,
    *,
    tokens: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    capability: int,
    num_sms: int,
    descriptors: bool,
) -> LinearConfig:
    """The configuration for one product.

    Args:
        form: ``rows`` (QKV, up) or ``columns`` (out, down).
        tokens: T.
        outputs: N.
        inputs: K.
        dtype: Of tokens and weights.
        capability: 80, 86, 89, 90...
        num_sms: Multiprocessors of the card.
        descriptors: Whether the copy engine may be used (alignment, host width).
    """
    if dtype == torch.float32:
        return LinearConfig(64, 64, 32, 4, 3)
    if capability < 90:
        if tokens <= 256:
            return LinearConfig(
                64, 32, 64, 4, 4, split_k=_split(form, tokens, outputs, inputs, 64, 32, num_sms)
            )
        return LinearConfig(128, 128, 32, 4, 3)
    if tokens <= 256:
        split = _split(form, tokens, outputs, inputs, 64, 32, num_sms)
        return LinearConfig(64, 32, 128, 4, 4, split_k=split)
    if tokens <= 2048:
        return LinearConfig(64, 128, 64, 4, 4, descriptors=descriptors)
    return LinearConfig(128, 128, 64, 4, 3, descriptors=descriptors)


def _split(
    form: Form, tokens: int, outputs: int, inputs: int, block_m: int, block_n: int, num_sms: int
) -> int:
    """Splits of K that fill the card, where the row kernel adds the partial sums anyway."""
    if form == "rows":
        return 1
    tiles = _divide(tokens, block_m) * _divide(outputs, block_n)
    split = 1
    while split < 8 and tiles * split * 2 <= 2 * num_sms and inputs // (split * 2) >= 128:
        split *= 2
    return split


def attention_config(*, max_seqlen: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration for sequences of at most `max_seqlen` tokens."""
    if dtype == torch.float32:
        return AttentionConfig(32, 32, 4, 2) if head_dim > 64 else AttentionConfig(64, 32, 4, 2)
    if max_seqlen <= SINGLE_TILE_KEYS:
        tile = max(16, 1 << (max_seqlen - 1).bit_length())
        return AttentionConfig(min(tile, 64), tile, 4, 1)
    return AttentionConfig(64, 64, 4, 3)


# Longest sequence whose scores are computed as one tile.
SINGLE_TILE_KEYS = 128


def norm_config(*, tokens: int, hidden_size: int) -> NormConfig:
    """The configuration of the row kernel."""
    return NormConfig(rows=1 if tokens <= 2048 else 4, num_warps=4)
