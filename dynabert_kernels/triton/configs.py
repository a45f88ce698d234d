"""Tile shapes per problem class, as data.

An H200 has chosen those of sm_90 in half precision (benchmarks/results/gpu_tuning.jsonl;
`benchmarks.gpu_triton` sweeps them). No card has measured the others: they are chosen to fill a
card and to fit. tests/kernels compile each one for sm_80 and sm_90 and check shared memory,
registers and tensor-core instructions.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Form = Literal["rows", "gradient", "columns"]

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
        subtiles: Parts a tile is finished and stored in, each of 1 / subtiles of its outputs; with
            descriptors.
        persistent: Programs per multiprocessor, each of which takes tile after tile; 0 for a
            program per tile. With descriptors, and a width from the host or (except in form
            `columns`) tiles of one width.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    split_k: int = 1
    subtiles: int = 1
    persistent: int = 0


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is cut up, forward or backward; one key block is the single-tile path.

    Attributes:
        block_queries: Queries of a program, or of a step.
        block_keys: Keys of a step, or of a program.
        num_warps: Warps of a program.
        num_stages: Steps in flight; of the single tile, heads.
        heads: Heads of a program, one after the other; forward only.
        max_registers: Of a thread; None leaves it to the compiler.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    heads: int = 1
    max_registers: int | None = None


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
    other_dtype: torch.dtype | None = None,
    keeps_before: bool = False,
    dropout: bool = False,
    block_m: int | None = None,
    one_width: bool = True,
) -> LinearConfig:
    """The configuration for one product.

    Args:
        form: ``rows`` (QKV, up), ``gradient`` (of up) or ``columns`` (out, down, their like).
        tokens: T.
        outputs: N; with `block_m` the most that a tile may have.
        inputs: K; likewise.
        dtype: Of tokens and weights.
        capability: 80, 86, 89, 90...; all but 90 take what fits the smallest of them.
        num_sms: Multiprocessors of the card.
        aligned: Whether rows and bases of all matrices allow wide copies. Without them tiles pass
            through registers, and only small ones fit.
        other_dtype: Of the residual, or of the values before the activation.
        keeps_before: Whether a product with activation has two results.
        dropout: Whether there is any; its random numbers need a dozen registers for each result.
        block_m: Tokens of a tile of `RowTiles`, 64 or 128.
        one_width: Whether all tiles of `RowTiles` have one width.
    """
    if not aligned:
        return LinearConfig(block_m or 32, 64 if block_m is None else 32, 32, 4, 2)
    if dtype == torch.float32:
        many_values = block_m == 128 or form == "gradient"
        block_n = 32 if form == "gradient" else 64
        return LinearConfig(block_m or 64, block_n, 32, 8 if many_values else 4, 3)
    if tokens <= SMALL_BATCH and block_m != 128:
        return _small_config(form, tokens, outputs, inputs, capability, num_sms)
    if capability != 90:
        # The other epilogues spill registers at 128 outputs.
        plain = form != "gradient" and not keeps_before and block_m is None
        plain = plain and not dropout and other_dtype in (None, dtype)
        return LinearConfig(block_m or 128, 128 if plain else 64, 32, 4 if block_m == 64 else 8, 3)
    config = _hopper_config(
        form,
        tokens,
        outputs,
        inputs,
        num_sms,
        block_m=block_m,
        one_width=one_width,
        keeps_before=keeps_before,
        wide=other_dtype == torch.float32,
    )
    return replace(config, subtiles=2) if dropout else config


def _small_config(
    form: Form, tokens: int, outputs: int, inputs: int, capability: int, num_sms: int
) -> LinearConfig:
    """Tiles that occupy a card with few tokens.

    At T = 128, H200: K in two shares takes 3.3 us for out (one 4.2, four 4.1) and 5.2 us for down
    (8.0, 5.5). 64 outputs of 2304 take 4.4 us where 32 take 5.3; of 576 it is 4.3 and 3.9.
    """
    block_n = 64 if form != "columns" and outputs >= 2048 else 32
    tiles = -(-tokens // 64) * -(-outputs // block_n)
    split = 2 if form == "columns" and tiles <= num_sms and inputs >= 128 else 1
    return LinearConfig(64, block_n, 128 if capability == 90 else 64, 4, 4, split_k=split)


def _hopper_config(
    form: Form,
    tokens: int,
    outputs: int,
    inputs: int,
    num_sms: int,
    *,
    block_m: int | None,
    one_width: bool,
    keeps_before: bool,
    wide: bool,
) -> LinearConfig:
    """Tiles by how many there are for each multiprocessor; times of an H200, BERT-base, in us.

    Programs that take tile after tile load the next while they finish one: QKV at T = 16384 takes
    90 so (cuBLAS 91) and 101 otherwise. A residual, or the gradient's `before`, is a load in the
    epilogue that only a second program on the multiprocessor hides, so those take tile by tile: out
    40 (43), the gradient of up 207 (223). Tiles of 256 outputs pay from some 12 tiles of 128 a
    multiprocessor on. With few tiles halves fill the last wave: at T = 4096 down takes 31, not 35.
    """

    def tiles(height: int, width: int) -> int:
        return -(-tokens // height) * -(-outputs // width)

    if block_m == 64 or (block_m is None and tiles(64, 128) <= num_sms):
        few = tiles(64, 128) <= num_sms
        return LinearConfig(64, 128, 64, 4, 4 if few else 3, descriptors=True)
    num_tiles = tiles(128, 128)
    if form == "rows" and num_tiles > 4 * num_sms and one_width:
        if num_tiles > 12 * num_sms and not keeps_before and block_m is None:
            return LinearConfig(128, 256, 64, 8, 3, descriptors=True, subtiles=2, persistent=1)
        return LinearConfig(128, 128, 64, 8, 3, descriptors=True, subtiles=2, persistent=2)
    if num_tiles > 2 * num_sms and (form != "rows" or block_m is not None):
        if form == "columns" and inputs >= 2304 and block_m is None and not wide:
            return LinearConfig(128, 256, 64, 8, 3, descriptors=True, subtiles=2, persistent=1)
        subtiles = 2 if form == "gradient" else 1
        return LinearConfig(128, 128, 64, 8, 3, descriptors=True, subtiles=subtiles)
    if form == "columns" and block_m is None:
        return LinearConfig(64, 128, 64, 4, 3, descriptors=True)
    return LinearConfig(128, 64, 64, 4, 3, descriptors=True)


def attention_config(
    *,
    max_seqlen: int,
    head_dim: int,
    dtype: torch.dtype,
    capability: int,
    dropout: bool,
    heads_per_sm: float,
    mean_seqlen: float,
) -> AttentionConfig:
    """The forward configuration for sequences of at most `max_seqlen` tokens.

    Args:
        max_seqlen: See above.
        head_dim: D.
        dtype: Of the projection.
        capability: See `linear_config`.
        dropout: Whether there is any: its random numbers take a dozen registers for each score of
            a tile, so tiles are small.
        heads_per_sm: Heads of all sequences, over the multiprocessors of the card.
        mean_seqlen: Tokens of a sequence, on average.
    """
    wide = head_dim > 64
    if dtype == torch.float32:
        if wide:
            return AttentionConfig(16, 16 if dropout else 32, 4, 1)
        return AttentionConfig(16, 32, 4, 2)
    tile = _tile(max_seqlen)
    if dropout and tile > 32:
        return AttentionConfig(32, 32, 4, 2) if wide else AttentionConfig(64, 32, 4, 2, 1, 168)
    if capability == 90 and not wide and not dropout:
        return _hopper_attention(tile, heads_per_sm, mean_seqlen)
    if tile <= SINGLE_TILE_KEYS:
        return AttentionConfig(min(tile, 64), tile, 4, 1)
    if wide:
        return AttentionConfig(64, 32, 4 if capability == 90 else 8, 3)
    return AttentionConfig(64, 64, 4, 3)


def _hopper_attention(tile: int, heads_per_sm: float, mean_seqlen: float) -> AttentionConfig:
    """What an H200 was fastest with, BERT-base's 12 heads of 64 in bfloat16, 16384 tokens.

    Lengths 16, 32, 64: 28 us each (29 to 36 with one head to a program). 128: 34 us; 56 us without
    the limit on registers, with which two programs fit a multiprocessor and hide each other's
    loads. 512: 76 us.
    """
    if tile > SINGLE_TILE_KEYS:
        return AttentionConfig(128, 64, 8, 3, max_registers=128)
    if heads_per_sm <= 4:
        return AttentionConfig(min(tile, 64), tile, 4, 1)
    if tile == SINGLE_TILE_KEYS:
        # 512 short texts of up to 128 tokens, 23 on average: 46 us; 90 us with whole tiles.
        if mean_seqlen < SINGLE_TILE_KEYS / 2:
            return AttentionConfig(64, 32, 4, 2, heads=3)
        return AttentionConfig(128, 128, 8, 2, heads=3, max_registers=128)
    return AttentionConfig(tile, tile, tile // 16, 2, heads=3)


def attention_gradient_config(
    *,
    max_seqlen: int,
    head_dim: int,
    dtype: torch.dtype,
    capability: int,
    dropout: bool,
    mean_seqlen: float,
) -> AttentionConfig:
    """The backward configuration; arguments as of `attention_config`."""
    wide = head_dim > 64
    tile = _tile(max_seqlen)
    if dtype == torch.float32:
        if head_dim == 32 and tile > 32:
            return AttentionConfig(16, 32, 4, 1)
        if head_dim == 64 and tile > 32:
            return AttentionConfig(32, 32, 8, 1)
        return AttentionConfig(16, 16, 4 if head_dim == 32 else 8, 1)
    if capability == 90 and not dropout:
        if wide and tile > 64:
            return AttentionConfig(64, 64, 8, 2)
        if not wide:
            return _hopper_gradient(tile, mean_seqlen)
    if tile <= 32 or (wide and dropout):
        return AttentionConfig(min(tile, 32), min(tile, 32), 4, 1)
    if wide or capability != 90:
        return AttentionConfig(32, 64, 8 if wide or dropout else 4, 1)
    if tile == 64:
        return AttentionConfig(32, 64, 8, 1)
    return AttentionConfig(32, 128, 8, 1) if tile == 128 else AttentionConfig(32, 64, 4, 2)


def _hopper_gradient(tile: int, mean_seqlen: float) -> AttentionConfig:
    """What an H200 was fastest with, in the setting of `_hopper_attention`.

    Lengths 16, 32, 64, 128, 512: 56, 59, 68, 109 and 256 us.
    """
    if tile <= 32:
        return AttentionConfig(16, tile, tile // 16, 2)
    if tile == 64:
        return AttentionConfig(32, 64, 4, 2, max_registers=168)
    if tile == SINGLE_TILE_KEYS and mean_seqlen >= SINGLE_TILE_KEYS / 2:
        return AttentionConfig(64, 128, 8, 1)
    # Short texts of up to 128 tokens too: 109 us, 211 us in one pass over whole tiles.
    return AttentionConfig(32, 64, 4, 2, max_registers=128)


def _tile(max_seqlen: int) -> int:
    """The least power of two that holds a sequence, and that a tensor core takes."""
    return max(16, 1 << (max_seqlen - 1).bit_length())
