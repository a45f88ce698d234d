"""Ragged batches: padding is removed once before the encoder and restored once after it.

A ragged batch is ``[total_tokens, ...]``, sequences back to back, with ``cu_seqlens``: sequence
``b`` owns rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.

Letters: B batch_size, S seq_len (padded), T total_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynabert_kernels import _extension

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
        total_tokens: Real tokens.
    """

    indices: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    seq_len: int
    total_tokens: int

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
        if self.indices is not None:
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
        offsets = self.cu_seqlens.tolist()
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
        )
        return packing, tokens


def unpad(attention_mask: Tensor) -> Packing:
    """Find the real tokens of a padded batch; padding may be left, right or in holes.

    Reads two numbers back from the device (total and longest length): once per batch.

    Args:
        attention_mask: Non-zero where a token is real, ``[B, S]``; bool, integer or float.

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
        return Packing(indices, offsets, longest, batch_size, seq_len, total)
    real = attention_mask != 0
    lengths = real.sum(dim=1, dtype=torch.int32)
    offsets = torch.zeros(batch_size + 1, dtype=torch.int32, device=real.device)
    offsets[1:] = lengths.cumsum(0, dtype=torch.int32)
    longest = lengths.max() if batch_size else offsets[0]
    total_tokens, max_seqlen = torch.stack((offsets[-1], longest)).tolist()
    if total_tokens == batch_size * seq_len:
        return Packing(None, offsets, seq_len, batch_size, seq_len, total_tokens)
    indices = real.reshape(-1).nonzero().reshape(-1)
    return Packing(indices, offsets, max_seqlen, batch_size, seq_len, total_tokens)


def offsets_of(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """``cu_seqlens`` of sequences with these lengths, ``[len(lengths) + 1]``, int32."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return torch.tensor(offsets, dtype=torch.int32, device=device)


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
