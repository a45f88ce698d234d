"""Which layers a call runs, at what widths, for which of its sequences, and the states between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import ne
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dynabert.subnet import SubnetShape
from dynabert_kernels.ops import forced_backend
from dynabert_kernels.varlen import sent

EntryT = TypeVar("EntryT")
# Integers between which kernels can load a whole vector: 16 bytes.
ALIGNMENT = 4


class LayerStep(NamedTuple):
    """One layer of a call: which, at what width, for which sequences.

    Widths are one number, or int32 with one per sequence that runs the layer; `rows` is None for
    all.
    """

    layer: int
    num_heads: int | Tensor
    intermediate_size: int | Tensor
    rows: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class DeviceSubnet:
    """What a graph runs that is made once: fixed layers, at widths that are read on the device.

    Attributes:
        steps: The layers; widths are int32 on the device, one for the batch or one per sequence.
        order: The number of the sequence at each place among the packed tokens, int64; None for the
            order of the batch.
    """

    steps: tuple[LayerStep, ...]
    order: Tensor | None = None


def device_widths(steps: Sequence[LayerStep]) -> tuple[Tensor, Tensor] | None:
    """Heads and neurons, ``[1]`` each, where every step reads the same two tensors; else None."""
    if not steps:
        return None
    heads, neurons = steps[0].num_heads, steps[0].intermediate_size
    if not (isinstance(heads, Tensor) and isinstance(neurons, Tensor)):
        return None
    if heads.numel() != 1 or neurons.numel() != 1:
        return None
    if any(s.num_heads is not heads or s.intermediate_size is not neurons for s in steps):
        return None
    return heads, neurons


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


def distinct_shapes(
    subnets: Iterable[EntryT], shape_of: Callable[[EntryT], SubnetShape]
) -> tuple[list[SubnetShape], list[int]]:
    """The different shapes among the subnets of a batch, and which of them each sequence has.

    Batches mostly name a few objects many times; each is resolved once.
    """
    numbers: dict[SubnetShape, int] = {}
    known: dict[int, int] = {}
    of_row = []
    for subnet in subnets:
        number = known.get(id(subnet))
        if number is None:
            number = known[id(subnet)] = numbers.setdefault(shape_of(subnet), len(numbers))
        of_row.append(number)
    return list(numbers), of_row


def widest_first(shapes: Sequence[SubnetShape], of_row: Sequence[int]) -> list[int] | None:
    """The order in which sequences of one shape are neighbours, the widest first.

    None where they already are neighbours: kernels then share their tiles as they lie.

    Args:
        shapes: The different shapes of a batch.
        of_row: Which of them each sequence has.
    """
    if 1 + sum(map(ne, of_row, of_row[1:])) <= len(shapes):
        return None
    widths = [[(layer.num_heads, layer.intermediate_size) for layer in s.layers] for s in shapes]
    ranks = [0] * len(shapes)
    by_width = sorted(range(len(shapes)), key=widths.__getitem__, reverse=True)
    for rank, number in enumerate(by_width):
        ranks[number] = rank
    return sorted(range(len(of_row)), key=[ranks[number] for number in of_row].__getitem__)


def sent_steps(steps: Iterable[LayerStep], device: torch.device) -> tuple[LayerStep, ...]:
    """`steps` with their widths on a GPU, all of them in one copy; equal ones are one tensor.

    Widths stay on the CPU beside tokens there, where `reference` is forced, which reads them, and
    in a graph being compiled, which holds them as constants.
    """
    steps = tuple(steps)
    on_cpu = device.type == "cpu" or forced_backend() == "reference"
    if on_cpu or torch.compiler.is_compiling():
        return steps
    places: dict[tuple[int, ...], int] = {}
    values: list[int] = []

    def place(width: int | Tensor) -> tuple[int, ...]:
        if not isinstance(width, Tensor):
            return ()
        key = tuple(width.tolist())
        if key not in places:
            places[key] = len(values)
            values.extend(key + (0,) * (-len(key) % ALIGNMENT))
        return key

    keys = [(place(step.num_heads), place(step.intermediate_size)) for step in steps]
    if not values:
        return steps
    together = sent(torch.tensor(values, dtype=torch.int32), device)
    tensors = {key: together[start : start + len(key)] for key, start in places.items()}
    return tuple(
        step._replace(
            num_heads=tensors.get(heads, step.num_heads),
            intermediate_size=tensors.get(neurons, step.intermediate_size),
        )
        for step, (heads, neurons) in zip(steps, keys, strict=True)
    )


def device_steps(steps: Iterable[LayerStep], device: torch.device) -> tuple[LayerStep, ...]:
    """`steps` with widths that kernels read on the device, which then leave spare rows alone."""

    def width(value: int | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((1,), value, dtype=torch.int32, device=device)

    return tuple(
        step._replace(
            num_heads=width(step.num_heads), intermediate_size=width(step.intermediate_size)
        )
        for step in steps
    )


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
