"""Tile shapes per problem class, as data.

No card has measured them. They are chosen to fill a card and to fit: tests/kernels compile each one
for sm_80 and sm_90 and check shared memory, registers and tensor-core instructions.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Form = Literal["rows", "columns"]

# Most tokens of a batch that leaves multiprocessors idle unless tiles are small and K is split.
SMALL_BATCH = 256
# Longest sequence whose scores are computed as one tile.
SINGLE_TILE_KEYS = 128


@dataclass(frozen=True)
class LinearConfig:
    """How one matrix product is cut up; see `gemm`.

    Attributes:
        block_m: Tokens of a tile.
        block_n: Outputs of a tile.
        block_k: Inputs of a step.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        descriptors: Loads and stores by the copy engine of sm_90.
        split_k: Programs that share a tile, each with a share of K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    split_k: int = 1


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is cut up; one key block is the single-tile path.

    Attributes:
        block_queries: Queries of a program.
        block_keys: Keys of a step.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def linear_config(
    form: Form,
    *,
    tokens: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    capability: int,
    num_sms: int,
    aligned: bool,
) -> LinearConfig:
    """The configuration for one product.

    Args:
        form: ``rows`` (QKV, up) or ``columns`` (out, down).
        tokens: T.
        outputs: N.
        inputs: K.
        dtype: Of tokens and weights.
        capability: 80, 86, 89, 90...; all but 90 take what fits the smallest of them.
        num_sms: Multiprocessors of the card.
        aligned: Whether rows and bases of all matrices allow wide copies. Without them tiles pass
            through registers, and only small ones fit.
    """
    if not aligned:
        return LinearConfig(32, 64, 32, 4, 2)
    if dtype == torch.float32:
        return LinearConfig(64, 64, 32, 4, 3)
    hopper = capability == 90
    if tokens <= SMALL_BATCH:
        block_m, block_n, block_k = 64, 32, 128 if hopper else 64
        tiles = -(-tokens // block_m) * -(-outputs // block_n)
        split = 1 if form == "rows" else _split_k(tiles, inputs, num_sms)
        return LinearConfig(block_m, block_n, block_k, 4, 4, split_k=split)
    if not hopper:
        return LinearConfig(128, 128, 32, 8, 3)
    if tokens <= 2048:
        return LinearConfig(64, 128, 64, 4, 4, descriptors=True)
    return LinearConfig(128, 128, 64, 8, 3, descriptors=True)


def _split_k(tiles: int, inputs: int, num_sms: int) -> int:
    """Splits that give every multiprocessor about two programs, of at least 128 inputs each."""
    split = 1
    while split < 8 and tiles * split <= num_sms and inputs // (split * 2) >= 128:
        split *= 2
    return split


def attention_config(*, max_seqlen: int, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration for sequences of at most `max_seqlen` tokens."""
    if dtype == torch.float32:
        return AttentionConfig(16, 32, 4, 1) if head_dim > 64 else AttentionConfig(32, 32, 4, 2)
    if max_seqlen <= SINGLE_TILE_KEYS:
        tile = max(16, 1 << (max_seqlen - 1).bit_length())
        return AttentionConfig(min(tile, 64), tile, 4, 1)
    return AttentionConfig(64, 32 if head_dim > 64 else 64, 4, 3)
