"""Ragged batches: padding is removed once before the encoder and restored once after it.

A ragged batch is ``[total_tokens, ...]``, sequences back to back, with ``cu_seqlens``: sequence
``b`` owns rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

Letters: B batch_size, S seq_len (padded), T total_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import sub

import torch
from torch import Tensor

from dynabert_kernels import _extension
from dynabert_kernels.triton import availability

_LIBRARY = torch.library.Library("dynabert", "FRAGMENT")
_LIBRARY.define(
    "unpad.cpu(Tensor attention_mask) -> "
    "(Tensor cu_seqlens, Tensor indices, int max_seqlen, int total_tokens)"
)
_NATIVE_UNPAD = torch.ops.dynabert.unpad.cpu
_HAS_KERNEL = _extension.has_kernel("dynabert::unpad.cpu")


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the real tokens of a padded batch are.

    Attributes:
        indices: Flat position ``row * seq_len + column`` of each real token, ``[T]``, int64;
            None when every position is real, so that packing is a reshape.
        cu_seqlens: Ragged offsets, ``[B + 1]``, int32.
        max_seqlen: Length of the longest sequence, in tokens.
        batch_size: Sequences.
        seq_len: Padded length.
        total_tokens: Rows of the packed batch: its real tokens, or as many as there may be where
            only the device knows how many are real (`unpad_on_device`).
        offsets: `cu_seqlens` on the host, where it is known there.
        slots: Row of each padded position in the packed batch, negative where it is padding,
            ``[B * S]``, int64; only where the device alone knows which positions are real.
    """

    indices: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    seq_len: int
    total_tokens: int
    offsets: tuple[int, ...] | None = None
    slots: Tensor | None = None

    @classmethod
    def dense(
        cls, batch_size: int, seq_len: int, device: torch.device | str | None = None
    ) -> Packing:
        """The packing of a batch without padding: no gather and no host synchronisation."""
        if torch.compiler.is_compiling() or seq_len < 1:
            offsets = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
        else:
            end = batch_size * seq_len + 1
            offsets = torch.arange(0, end, seq_len, dtype=torch.int32, device=device)
        return cls(None, offsets, seq_len, batch_size, seq_len, batch_size * seq_len)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of each sequence, ``[B]``, int32."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def repeat(self, count: int) -> Packing:
        """The packing of this batch `count` times, one after the other."""
        assert self.slots is None, "offsets have no gaps, and the copies would"
        if count == 1:
            return self
        times = torch.arange(count, device=self.cu_seqlens.device)[:, None]
        indices = self.indices
        if indices is not None:
            indices = (indices + times * (self.batch_size * self.seq_len)).flatten()
        starts = (self.cu_seqlens[:-1] + times * self.total_tokens).flatten()
        end = self.cu_seqlens[-1:] * count
        return Packing(
            indices,
            torch.cat([starts.to(torch.int32), end]),
            self.max_seqlen,
            self.batch_size * count,
            self.seq_len,
            self.total_tokens * count,
        )

    def pack(self, padded: Tensor) -> Tensor:
        """Keep the real tokens of ``[B, S, ...]``, giving ``[T, ...]``; differentiable.

        Raises:
            ValueError: The first two sizes are not ``[batch_size, seq_len]``.
        """
        if padded.dim() < 2 or tuple(padded.shape[:2]) != (self.batch_size, self.seq_len):
            raise ValueError(
                f"Packing.pack: padded.shape={list(padded.shape)}, expected "
                f"[{self.batch_size}, {self.seq_len}, ...]. Pass the batch that was unpadded."
            )
        flat = padded.reshape(self.batch_size * self.seq_len, *padded.shape[2:])
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def restore(self, packed: Tensor) -> Tensor:
        """Put ``[T, ...]`` back to ``[B, S, ...]`` with zeros at padding; differentiable.

        Raises:
            ValueError: The first size is not the number of real tokens.
        """
        if packed.dim() < 1 or packed.shape[0] != self.total_tokens:
            raise ValueError(
                f"Packing.restore: packed.shape={list(packed.shape)}, expected "
                f"[{self.total_tokens}, ...]. Pass one row per real token."
            )
        trailing = packed.shape[1:]
        if self.slots is not None and self.total_tokens > 0:
            if packed.dim() == 2 and _runs_triton(packed):
                from dynabert_kernels.triton import padding

                packed = padding.restore(packed.contiguous(), self.slots)
                return packed.reshape(self.batch_size, self.seq_len, *trailing)
            # A choice and not a product: rows that no slot names may hold anything.
            real = (self.slots >= 0).view(-1, *[1] * len(trailing))
            packed = torch.where(real, packed.index_select(0, self.slots.clamp(min=0)), 0)
        elif self.indices is not None:
            flat = packed.new_zeros(self.batch_size * self.seq_len, *trailing)
            packed = flat.index_copy(0, self.indices, packed)
        return packed.reshape(self.batch_size, self.seq_len, *trailing)

    def sequence_of_token(self) -> Tensor:
        """The sequence each real token belongs to, ``[T]``, int64."""
        return sequence_of_token(self.cu_seqlens, self.total_tokens)

    def select(self, rows: Sequence[int]) -> tuple[Packing, Tensor | slice]:
        """The packing of some sequences, and where their tokens are in this one.

        For batches whose sequences keep different layers: ``hidden[tokens]`` are the tokens of
        the selected sequences, in the order of `rows`.

        Args:
            rows: Sequence numbers, in the order wanted.

        Returns:
            The packing of the selected sequences, and their token positions: a slice where
            `rows` are consecutive (then ``hidden[tokens]`` is a view), else int64 ``[T']``.

        Raises:
            ValueError: A row is out of range.
        """
        for row in rows:
            if not 0 <= row < self.batch_size:
                raise ValueError(
                    f"Packing.select: row={row}, expected 0 to {self.batch_size - 1}. "
                    f"The batch holds {self.batch_size} sequences."
                )
        offsets = self.host_offsets()
        spans = [(offsets[row], offsets[row + 1]) for row in rows]
        tokens = token_positions(spans, self.cu_seqlens.device)
        lengths = [stop - start for start, stop in spans]
        new_offsets = offsets_of(lengths, self.cu_seqlens.device)
        indices = self.indices
        if indices is not None:
            column = indices[tokens] % self.seq_len
            indices = sequence_of_token(new_offsets, sum(lengths)) * self.seq_len + column
        packing = Packing(
            indices,
            new_offsets,
            max(lengths, default=0),
            len(lengths),
            self.seq_len,
            sum(lengths),
            tuple(accumulate(lengths, initial=0)),
        )
        return packing, tokens

    def host_offsets(self) -> Sequence[int]:
        """`cu_seqlens` on the host; waits for the device where it is not known there yet."""
        if self.offsets is not None:
            return self.offsets
        if self.indices is None and self.seq_len > 0:
            return range(0, self.total_tokens + 1, self.seq_len)
        return self.cu_seqlens.tolist()

    def without_spare_gradients(self, packed: Tensor) -> Tensor:
        """`packed`, ``[T, ...]``, through which no gradient of a row past the last token passes."""
        real = torch.arange(self.total_tokens, device=packed.device) < self.cu_seqlens[-1]
        return torch.where(real.view(-1, *[1] * (packed.dim() - 1)), packed, 0)

    def without_spare_rows(self) -> Packing:
        """This packing with as many rows as there are real tokens; waits for the device."""
        total = int(self.cu_seqlens[-1])
        indices = None if self.indices is None else self.indices[:total]
        return replace(self, indices=indices, total_tokens=total)

    def reordered(self, order: Sequence[int]) -> Packing:
        """The packing of this batch with its sequences in another order among the packed tokens.

        The padded batch stays as it is: `pack` and `restore` lead from and to the same positions.

        Args:
            order: The number of the sequence at each place, each once.
        """
        offsets = self.host_offsets()
        lengths = [offsets[row + 1] - offsets[row] for row in order]
        new_offsets = tuple(accumulate(lengths, initial=0))
        shifts = [offsets[row] - start for row, start in zip(order, new_offsets, strict=False)]
        device = self.cu_seqlens.device
        numbers = sent(torch.tensor([*new_offsets, *shifts], dtype=torch.int32), device)
        cu_seqlens, shift = numbers.split([len(new_offsets), len(shifts)])
        tokens = torch.arange(self.total_tokens, dtype=torch.int32, device=device)
        if shifts:
            tokens = tokens + shift[torch.searchsorted(cu_seqlens[1:], tokens, right=True)]
        indices = tokens.long() if self.indices is None else self.indices.index_select(0, tokens)
        return replace(self, indices=indices, cu_seqlens=cu_seqlens, offsets=new_offsets)


def unpad(attention_mask: Tensor, device: torch.device | None = None) -> Packing:
    """Find the real tokens of a padded batch; padding may be left, right or in holes.

    Reads the offsets back from the device of the mask, which waits for it: once per batch. A mask
    on the CPU beside tokens on a GPU is what saves this wait: only one copy to `device` is queued.

    Args:
        attention_mask: Non-zero where a token is real, ``[B, S]``; bool, integer or float.
        device: Where the tokens are; None for beside the mask.

    Raises:
        TypeError: `attention_mask` is not a tensor.
        ValueError: `attention_mask` is not two-dimensional.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"unpad: attention_mask={type(attention_mask).__name__}, expected a Tensor. "
            "Pass the tokenizer's attention_mask."
        )
    if attention_mask.dim() != 2:
        raise ValueError(
            f"unpad: attention_mask.shape={list(attention_mask.shape)}, expected "
            "[batch_size, seq_len]. Masks over pairs of tokens cannot be unpadded."
        )
    batch_size, seq_len = attention_mask.shape
    if _HAS_KERNEL and attention_mask.is_cpu and not torch.compiler.is_compiling():
        # One op for eight: every call of a model on padded sequences asks.
        offsets, places, longest, total = _NATIVE_UNPAD(attention_mask)
        indices = None if total == batch_size * seq_len else places
        packing = Packing(indices, offsets, longest, batch_size, seq_len, total)
        return packing if device is None or device.type == "cpu" else _sent_packing(packing, device)
    real = attention_mask != 0
    offsets = _offsets(real.sum(dim=1, dtype=torch.int32))
    on_host = tuple(offsets.tolist())
    total_tokens = on_host[-1]
    longest = max(map(sub, on_host[1:], on_host), default=0)
    indices = None
    if total_tokens < batch_size * seq_len:
        # With its size known beforehand, the search does not wait for the device.
        indices = torch.nonzero_static(real.reshape(-1), size=total_tokens).reshape(-1)
    packing = Packing(indices, offsets, longest, batch_size, seq_len, total_tokens, on_host)
    if device is None or device == packing.cu_seqlens.device:
        return packing
    return _sent_packing(packing, device)


def unpad_on_device(attention_mask: Tensor, order: Tensor | None = None) -> Packing:
    """Find the real tokens of a padded batch with shapes that do not depend on them.

    For CUDA graphs and compiled graphs: nothing is read back. The packed batch has room for every
    position; real tokens are packed to its front, and end at ``cu_seqlens[-1]``. The rows past it
    repeat some token, and what an op makes of them is never restored.

    Args:
        attention_mask: As for `unpad`.
        order: The number of the sequence at each place among the packed tokens, ``[B]``, int64;
            None for the order of the batch.
    """
    batch_size, seq_len = attention_mask.shape
    positions = batch_size * seq_len
    real = attention_mask != 0 if attention_mask.dtype != torch.bool else attention_mask
    if _runs_triton(real):
        from dynabert_kernels.triton import padding

        cu_seqlens, indices, slots = padding.unpad(real.contiguous(), order)
        return Packing(
            indices, cu_seqlens, seq_len, batch_size, seq_len, positions, offsets=None, slots=slots
        )
    lengths = real.sum(dim=1, dtype=torch.int32)
    cu_seqlens = _offsets(lengths if order is None else lengths.index_select(0, order))
    starts = cu_seqlens[:-1]
    if order is not None:
        starts = torch.zeros_like(starts).index_copy(0, order, starts)
    rows = starts[:, None] + real.cumsum(dim=1) - 1
    slots = torch.where(real, rows, -1).reshape(-1)
    # All padding writes to one row past the end, which is cut off.
    targets = torch.where(slots < 0, positions, slots)
    places = torch.arange(positions, device=real.device)
    indices = places.new_zeros(positions + 1).scatter(0, targets, places)[:positions]
    return Packing(
        indices, cu_seqlens, seq_len, batch_size, seq_len, positions, offsets=None, slots=slots
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU without waiting for work queued on that device."""
    return tensor.to(device, non_blocking=tensor.is_cpu)


def _runs_triton(tensor: Tensor) -> bool:
    """Whether a kernel may do what plain PyTorch does to `tensor`: not where that is recorded."""
    return (
        tensor.is_cuda
        and availability.triton_missing() is None
        and not torch.compiler.is_compiling()
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def _sent_packing(packing: Packing, device: torch.device) -> Packing:
    """`packing`, found on the CPU, on `device`: in one copy, since each is a launch."""
    offsets = packing.cu_seqlens
    parts = [offsets.view(torch.uint8)]
    if packing.indices is not None:
        parts.insert(0, packing.indices.view(torch.uint8))
    together = sent(torch.cat(parts), device)
    split = len(together) - offsets.nbytes
    return replace(
        packing,
        indices=None if packing.indices is None else together[:split].view(torch.int64),
        cu_seqlens=together[split:].view(torch.int32),
        offsets=tuple(offsets.tolist()),
    )


def _offsets(lengths: Tensor) -> Tensor:
    offsets = lengths.new_zeros(lengths.shape[0] + 1)
    offsets[1:] = lengths.cumsum(0, dtype=torch.int32)
    return offsets


def offsets_of(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """``cu_seqlens`` of sequences with these lengths, ``[len(lengths) + 1]``, int32."""
    offsets = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    return offsets if device is None else sent(offsets, torch.device(device))


def sequence_of_token(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """The sequence each token belongs to, ``[total_tokens]``, int64; empty ones own no token."""
    tokens = torch.arange(total_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True)


def position_in_sequence(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """The place of each token in its own sequence, from 0, ``[total_tokens]``, int64."""
    starts = cu_seqlens[:-1].index_select(0, sequence_of_token(cu_seqlens, total_tokens))
    return torch.arange(total_tokens, device=cu_seqlens.device) - starts


def token_positions(
    spans: Sequence[tuple[int, int]], device: torch.device | str | None = None
) -> Tensor | slice:
    """The tokens of some ``(start, stop)`` spans: a slice where they follow each other."""
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    if len(runs) <= 1:
        return slice(*runs[0]) if runs else slice(0, 0)
    return torch.cat(
        [torch.arange(start, stop, dtype=torch.int64, device=device) for start, stop in runs]
    )
