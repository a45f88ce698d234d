"""The order in which training rows are visited: a pure function of seed and epoch, so that resuming
is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Rows are sorted by length within groups of this many batches: long enough that a batch holds like
# lengths, short enough that the shuffle still decides who meets whom.
_BATCHES_PER_GROUP = 50


class RowOrder(Sampler[int]):
    """Indices of one epoch in a seeded random order, optionally with like lengths side by side.

    Grouped, rows are shuffled, sorted by length within groups of 50 batches, cut into batches, and
    the batches shuffled, the longest of all first, so that a batch too large for the memory fails
    at once.

    Args:
        lengths: Length of every row in tokens.
        batch_size: Rows that will be cut from the order at a time.
        seed: Chooses the order.
        epoch: Called when an epoch begins; the order differs from epoch to epoch.
        group_by_length: Whether to group.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        *,
        group_by_length: bool,
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._group_by_length = group_by_length

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch())
        order = torch.randperm(len(self), generator=generator).tolist()
        if not self._group_by_length:
            return iter(order)
        group = self._batch_size * _BATCHES_PER_GROUP
        rows = [
            row
            for start in range(0, len(order), group)
            for row in sorted(
                order[start : start + group], key=self._lengths.__getitem__, reverse=True
            )
        ]
        # A last smaller batch stays last: the data loader cuts the order into equal batches.
        num_whole = len(rows) // self._batch_size
        shuffled = torch.randperm(num_whole, generator=generator).tolist()
        if shuffled:
            longest = max(shuffled, key=lambda batch: self._lengths[rows[batch * self._batch_size]])
            shuffled.remove(longest)
            shuffled.insert(0, longest)
        return (
            row
            for batch in (*shuffled, num_whole)
            for row in rows[batch * self._batch_size : (batch + 1) * self._batch_size]
        )
