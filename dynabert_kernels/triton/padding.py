"""Padding out and in again on the device: two kernels in the place of some twenty small ones.

For graphs, where nothing may be read back and a kernel costs more to start than these take to run.
`dynabert_kernels.varlen.unpad_on_device` and `Packing.restore` call them; without a GPU the same is
done in plain PyTorch.

Letters: B sequences, S padded length, T rows of the packed batch (B * S), C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_kernels.triton.dispatch import cdiv, next_power_of_2, start

# Positions of earlier sequences that a program counts at once.
_COUNTED = 4096
_RESTORED_ROWS = 4


@triton.jit(do_not_specialize=["batch_size", "seq_len"])
def unpad_kernel(
    mask_ptr,  # [B, S], bool as bytes
    order_ptr,  # [B], int64
    cu_seqlens_ptr,  # [B + 1], int32
    indices_ptr,  # [B * S], int64
    slots_ptr,  # [B * S], int64
    batch_size,
    seq_len,
    HAS_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program packs one sequence, after counting the tokens before it. Grid: (B,).

    Real tokens go to the front of the packed rows and padding to their end, so that `indices` are a
    permutation and every spare row names some position.
    """
    place = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < seq_len
    before = 0
    for first in range(0, place, ROWS):
        rows = first + tl.arange(0, ROWS)
        earlier = rows < place
        if HAS_ORDER:
            rows = tl.load(order_ptr + rows, mask=earlier, other=0)
        at = rows.to(tl.int64)[:, None] * seq_len + columns[None, :]
        real = tl.load(mask_ptr + at, mask=earlier[:, None] & inside[None, :], other=0)
        before += tl.sum((real != 0).to(tl.int32))
    row = place
    if HAS_ORDER:
        row = tl.load(order_ptr + place)
    positions = tl.cast(row, tl.int64) * seq_len + columns
    real = (tl.load(mask_ptr + positions, mask=inside, other=0) != 0).to(tl.int32)
    count = tl.cumsum(real, 0)
    slots = before + count - 1
    tl.store(slots_ptr + positions, tl.where(real != 0, slots, -1).to(tl.int64), mask=inside)
    # Padding of the sequences before, and within this one.
    padding = place.to(tl.int64) * seq_len - before + columns - count
    last = batch_size.to(tl.int64) * seq_len - 1
    target = tl.where(real != 0, slots.to(tl.int64), last - padding)
    tl.store(indices_ptr + target, positions, mask=inside)
    tl.store(cu_seqlens_ptr + place + 1, before + tl.sum(real))
    if place == 0:
        tl.store(cu_seqlens_ptr, 0)


@triton.jit(do_not_specialize=["positions"])
def restore_kernel(
    packed_ptr,  # [T, C]
    slots_ptr,  # [B * S], int64
    padded_ptr,  # [B * S, C]
    positions,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program fills ROWS padded positions, zeros at padding. Grid: (cdiv(B * S, ROWS),)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    slots = tl.load(slots_ptr + rows, mask=rows < positions, other=-1)
    inside = (columns < channels)[None, :]
    # Rows that no slot names may hold anything: they are not loaded, not multiplied by zero.
    values = tl.load(
        packed_ptr + slots[:, None] * channels + columns[None, :],
        mask=(slots >= 0)[:, None] & inside,
        other=0.0,
    )
    at = rows[:, None] * channels + columns[None, :]
    tl.store(padded_ptr + at, values, mask=(rows < positions)[:, None] & inside)


def unpad(mask: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets ``[B + 1]`` int32, indices and slots ``[B * S]`` int64 of a padded batch.

    Args:
        mask: True where a token is real, ``[B, S]``; bool, contiguous.
        order: The number of the sequence at each place, ``[B]``, int64, contiguous; None for the
            order of the batch.
    """
    batch_size, seq_len = mask.shape
    offsets = torch.empty(batch_size + 1, dtype=torch.int32, device=mask.device)
    indices = torch.empty(batch_size * seq_len, dtype=torch.int64, device=mask.device)
    slots = torch.empty_like(indices)
    if batch_size == 0:
        return offsets.zero_(), indices, slots
    columns = next_power_of_2(max(seq_len, 1))
    start(
        unpad_kernel,
        (batch_size,),
        mask.view(torch.uint8),
        slots if order is None else order,
        offsets,
        indices,
        slots,
        batch_size,
        seq_len,
        HAS_ORDER=order is not None,
        ROWS=max(1, _COUNTED // columns),
        COLUMNS=columns,
    )
    return offsets, indices, slots


def restore(packed: Tensor, slots: Tensor) -> Tensor:
    """``[T, C]`` to ``[B * S, C]``, zeros where a slot is negative; `packed` is contiguous."""
    channels = packed.shape[1]
    padded = packed.new_empty(slots.shape[0], channels)
    if padded.numel() > 0:
        start(
            restore_kernel,
            (cdiv(len(slots), _RESTORED_ROWS),),
            packed,
            slots,
            padded,
            len(slots),
            channels,
            ROWS=_RESTORED_ROWS,
            COLUMNS=next_power_of_2(channels),
        )
    return padded
