"""Which layers a call runs, at what widths, for which of its sequences."""

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


def layer_steps(shapes: Sequence[SubnetShape]) -> list[LayerStep]:
    """The layers that run, in order, from one shape for all sequences or one for each."""
    if all(shape == shapes[0] for shape in shapes[1:]):
        return [
            LayerStep(layer.index, layer.num_heads, layer.intermediate_size, None)
            for layer in shapes[0].layers
        ]
    runs: dict[int, list[tuple[int, int, int]]] = {}
    for row, shape in enumerate(shapes):
        for layer in shape.layers:
            runs.setdefault(layer.index, []).append((row, layer.num_heads, layer.intermediate_size))
    steps = []
    for index in sorted(runs):
        rows, heads, neurons = zip(*runs[index], strict=True)
        some = None if len(rows) == len(shapes) else rows
        steps.append(LayerStep(index, width_of(heads), width_of(neurons), some))
    return steps


def width_of(values: tuple[int, ...], repeats: int = 1) -> int | Tensor:
    """One width for all, or each of `values` for `repeats` sequences."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.int32).repeat_interleave(repeats)
