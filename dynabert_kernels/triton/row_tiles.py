"""A batch of several widths, or of one that only the device knows, cut into tiles of one width.

The products of such a batch run on these tiles: no token may meet a weight past its own prefix, not
even to be multiplied by zero, since a NaN there would survive it. One small kernel builds the table
on the device, so a captured CUDA graph serves every width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_kernels.triton.dispatch import cdiv, start

# Most tokens of a batch whose tiles are half as high, to have enough of them for a card.
_FEW_TOKENS = 2048
_SEQUENCES = 32  # of a program
_OTHERS = 128  # sequences that these are compared with at once


class RowTiles(NamedTuple):
    """Tiles of token rows that share one width.

    Attributes:
        table: First token, end (exclusive) and width of each tile, int32 ``[max_tiles, 3]``; widest
            first, tiles of one width in the order of their tokens, unused entries zero at the end.
        block_m: No tile has more tokens.
        limit: Widest width: heads or neurons that buffers and weights hold.
        one_width: Whether all tiles have one width.
    """

    table: Tensor
    block_m: int
    limit: int
    one_width: bool = False


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _width_of(widths_ptr, sequences, mask, limit):
    width = tl.load(widths_ptr + sequences, mask=mask, other=0)
    return tl.minimum(tl.maximum(width, 0), limit)


@triton.jit(do_not_specialize=["total_tokens", "limit", "num_tiles"])
def uniform_tiles_kernel(
    offsets_end_ptr,  # the last of cu_seqlens, [1]
    widths_ptr,  # [1]
    table_ptr,  # [num_tiles, 3]
    total_tokens,
    limit,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK tiles of a batch of one width. Grid: (blocks,)."""
    tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.minimum(tl.load(offsets_end_ptr), total_tokens)
    width = tl.minimum(tl.maximum(tl.load(widths_ptr), 0), limit)
    first = tiles * BLOCK_M
    used = first < end
    at = table_ptr + tiles * 3
    tl.store(at, tl.where(used, first, 0), mask=tiles < num_tiles)
    tl.store(at + 1, tl.where(used, tl.minimum(first + BLOCK_M, end), 0), mask=tiles < num_tiles)
    tl.store(at + 2, tl.where(used, width, 0), mask=tiles < num_tiles)


@triton.jit(do_not_specialize=["batch_size", "total_tokens", "limit", "num_tiles"])
def sequence_tiles_kernel(
    offsets_ptr,  # [batch_size + 1]
    widths_ptr,  # [batch_size]
    table_ptr,  # [num_tiles, 3]
    batch_size,
    total_tokens,
    limit,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program places the tiles that start within BLOCK sequences. Grid: (blocks,).

    Neighbouring sequences of one width are a run, cut every BLOCK_M tokens. A tile comes after all
    those of wider runs and those of as wide runs before its own.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = mine < batch_size
    width = _width_of(widths_ptr, mine, real, limit)
    end_of_all = tl.minimum(tl.load(offsets_ptr + batch_size), total_tokens)
    run_first = tl.zeros((BLOCK,), dtype=tl.int32)
    run_end = tl.zeros((BLOCK,), dtype=tl.int32) + end_of_all
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    num_used = 0
    last_run_first = 0
    for base in range(0, batch_size, OTHERS):
        others = base + tl.arange(0, OTHERS)
        inside = others < batch_size
        first = tl.minimum(tl.load(offsets_ptr + others, mask=inside, other=0), total_tokens)
        end = tl.minimum(tl.load(offsets_ptr + others + 1, mask=inside, other=0), total_tokens)
        other_width = _width_of(widths_ptr, others, inside, limit)
        previous_width = _width_of(widths_ptr, others - 1, inside & (others > 0), limit)
        opens = inside & ((others == 0) | (other_width != previous_width))
        opening = tl.where(opens, first, 0)
        other_run = tl.maximum(tl.associative_scan(opening, 0, _maximum), last_run_first)
        last_run_first = tl.maximum(tl.max(opening, 0), last_run_first)
        starting = tl.cdiv(end - other_run, BLOCK_M) - tl.cdiv(first - other_run, BLOCK_M)
        starting = tl.where(inside, starting, 0)
        num_used += tl.sum(starting, 0)

        earlier = others[None, :] <= mine[:, None]
        opened_earlier = tl.where(opens[None, :] & earlier, first[None, :], 0)
        run_first = tl.maximum(run_first, tl.max(opened_earlier, 1))
        opened_later = tl.where(opens[None, :] & ~earlier, first[None, :], end_of_all)
        run_end = tl.minimum(run_end, tl.min(opened_later, 1))
        wider = other_width[None, :] > width[:, None]
        as_wide = (other_width[None, :] == width[:, None]) & (others[None, :] < mine[:, None])
        before += tl.sum(tl.where(wider | as_wide, starting[None, :], 0), 1)

    first = tl.minimum(tl.load(offsets_ptr + mine, mask=real, other=0), total_tokens)
    end = tl.minimum(tl.load(offsets_ptr + mine + 1, mask=real, other=0), total_tokens)
    first_tile = run_first + tl.cdiv(first - run_first, BLOCK_M) * BLOCK_M
    starting = tl.where(real, tl.cdiv(tl.maximum(end - first_tile, 0), BLOCK_M), 0)
    for step in range(0, tl.max(starting, 0)):
        token = first_tile + step * BLOCK_M
        place = before + step
        mask = (step < starting) & (place < num_tiles)
        at = table_ptr + place * 3
        tl.store(at, token, mask=mask)
        tl.store(at + 1, tl.minimum(token + BLOCK_M, run_end), mask=mask)
        tl.store(at + 2, width, mask=mask)
    unused = tl.arange(0, OTHERS)
    for base in range(tl.program_id(0) * OTHERS, num_tiles * 3, tl.num_programs(0) * OTHERS):
        entries = base + unused
        tl.store(table_ptr + entries, 0, mask=(entries >= num_used * 3) & (entries < num_tiles * 3))


def row_tiles(
    cu_seqlens: Tensor,
    widths: Tensor,
    total_tokens: int,
    limit: int,
    *,
    block_m: int | None = None,
) -> RowTiles:
    """Cut a ragged batch into tiles of one width each, on the device.

    Args:
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32, contiguous. Rows past the last
            offset are in no tile.
        widths: Heads or neurons of each sequence, or of all, ``[batch_size]`` or ``[1]``, int32,
            contiguous; clamped to 0 to `limit`.
        total_tokens: Rows of the buffers.
        limit: Heads or neurons that buffers and weights hold.
        block_m: Most tokens of a tile; by default 64 or 128, as `total_tokens` says.
    """
    batch_size = cu_seqlens.numel() - 1
    assert widths.numel() in (1, batch_size), (widths.shape, batch_size)
    if block_m is None:
        block_m = 64 if total_tokens <= _FEW_TOKENS else 128
    per_sequence = widths.numel() != 1
    num_tiles = cdiv(total_tokens, block_m) + per_sequence * batch_size
    table = torch.empty(num_tiles, 3, dtype=torch.int32, device=cu_seqlens.device)
    tiles = RowTiles(table, block_m, limit, one_width=not per_sequence)
    if num_tiles == 0:
        return tiles
    if per_sequence:
        start(
            sequence_tiles_kernel,
            (cdiv(batch_size, _SEQUENCES),),
            cu_seqlens,
            widths,
            table,
            batch_size,
            total_tokens,
            limit,
            num_tiles,
            BLOCK_M=block_m,
            BLOCK=_SEQUENCES,
            OTHERS=_OTHERS,
        )
    else:
        start(
            uniform_tiles_kernel,
            (cdiv(num_tiles, _OTHERS),),
            cu_seqlens[-1:],
            widths,
            table,
            total_tokens,
            limit,
            num_tiles,
            BLOCK_M=block_m,
            BLOCK=_OTHERS,
        )
    return tiles
