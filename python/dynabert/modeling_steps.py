"""Which layers a call runs, at what widths, for which of its sequences, and the states between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynabert.subnet import SubnetShape


class LayerStep(NamedTuple):
    """One layer of a call: which, at what width, for which sequences.

    Widths are one number, or int32 on the CPU with one per sequence that runs the layer; `rows` is
    None for all.
    """

    layer: int
    num_heads: int | Tensor
    intermediate_size: int | Tensor
    rows: tuple[int, ...] | None


def layer_steps(shapes: Sequence[SubnetShape]) -> tuple[LayerStep, ...]:
    """The layers that run, in order, from one shape for all sequences or one for each."""
    if all(shape == shapes[0] for shape in shapes[1:]):
        return tuple(
            LayerStep(layer.index, layer.num_heads, layer.intermediate_size, None)
            for layer in shapes[0].layers
        )
    runs: dict[int, list[tuple[int, int, int]]] = {}
    for row, shape in enumerate(shapes):
        for layer in shape.layers:
            runs.setdefault(layer.index, []).append((row, layer.num_heads, layer.intermediate_size))
    steps = []
    for index in sorted(runs):
        rows, heads, neurons = zip(*runs[index], strict=True)
        some = None if len(rows) == len(shapes) else rows
        steps.append(LayerStep(index, width_of(heads), width_of(neurons), some))
    return tuple(steps)


def width_of(values: tuple[int, ...], repeats: int = 1) -> int | Tensor:
    """One width for all, or each of `values` for `repeats` sequences."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.int32).repeat_interleave(repeats)


def own_states(
    padded: Sequence[Tensor], steps: Sequence[LayerStep], batch_size: int
) -> list[Tensor]:
    """Each sequence's own hidden states, from the state of the batch after each step."""
    if all(step.rows is None for step in steps):
        return list(padded)
    own: list[list[int]] = [[0] for _ in range(batch_size)]  # the steps that changed each sequence
    for done, step in enumerate(steps, start=1):
        for row in range(batch_size) if step.rows is None else step.rows:
            own[row].append(done)
    states = []
    for k in range(max(map(len, own))):
        groups: dict[int, list[int]] = {}
        for row, done_steps in enumerate(own):
            groups.setdefault(done_steps[k] if k < len(done_steps) else -1, []).append(row)
        pieces = [
            torch.zeros_like(padded[0][rows]) if done < 0 else padded[done][rows]
            for done, rows in groups.items()
        ]
        order = torch.tensor(
            [row for rows in groups.values() for row in rows], device=padded[0].device
        )
        states.append(torch.cat(pieces)[order.argsort()])
    return states
