"""The layers of a call: in which order its sequences are packed, and where its widths are."""

from __future__ import annotations

import pytest
import torch

from dynabert import SubnetConfig
from dynabert.modeling_steps import (
    ALIGNMENT,
    LayerStep,
    device_steps,
    distinct_shapes,
    layer_steps,
    sent_steps,
    widest_first,
)
from dynabert.subnet import SubnetShape
from dynabert_kernels import use_backend

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def shapes(*widths: float) -> list[SubnetShape]:
    """One shape for each width, each an object of its own."""
    return [SubnetConfig(width).resolve(**SIZES) for width in widths]


def order_of(shapes: list[SubnetShape]) -> list[int] | None:
    return widest_first(*distinct_shapes(shapes, lambda shape: shape))


@pytest.mark.parametrize("widths", [(1.0,), (0.5, 0.5), (0.25, 0.25, 1.0), (1.0, 0.5, 0.25)])
def test_neighbours_stay_where_they_are(widths: tuple[float, ...]) -> None:
    assert order_of(shapes(*widths)) is None


@pytest.mark.parametrize(
    ("widths", "order"),
    [((0.5, 1.0, 0.5), [1, 0, 2]), ((0.25, 0.5, 0.25, 1.0, 0.5), [3, 1, 4, 0, 2])],
)
def test_scattered_widths_are_grouped_widest_first(
    widths: tuple[float, ...], order: list[int]
) -> None:
    assert order_of(shapes(*widths)) == order


def test_equal_widths_of_different_depths_are_grouped_too() -> None:
    deep, flat = (SubnetConfig(0.5, depth).resolve(**SIZES) for depth in (1.0, 0.5))
    assert order_of([deep, flat, deep, flat]) == [0, 2, 1, 3]


def test_widths_stay_on_the_cpu_where_they_are_read_there() -> None:
    steps = layer_steps(shapes(0.5, 1.0))
    assert sent_steps(steps, torch.device("cpu")) is steps
    with use_backend("reference"):
        assert sent_steps(steps, torch.device("meta")) is steps


def test_equal_widths_are_sent_once_and_aligned() -> None:
    steps = (*layer_steps(shapes(0.5, 1.0, 0.25)), LayerStep(9, 3, 7, None))
    sent = sent_steps(steps, torch.device("meta"))
    heads = {id(step.num_heads) for step in sent[:-1]}
    assert len(heads) == 1
    assert sent[-1] is not steps[-1] and sent[-1] == steps[-1]
    for step, before in zip(sent[:-1], steps, strict=False):
        for name in ("num_heads", "intermediate_size"):
            width = getattr(step, name)
            assert width.is_meta and width.shape == getattr(before, name).shape
            assert width.storage_offset() % ALIGNMENT == 0


def test_device_steps_hold_the_widths_in_tensors() -> None:
    (step,) = device_steps((LayerStep(0, 3, 48, None),), torch.device("cpu"))
    for width, value in ((step.num_heads, 3), (step.intermediate_size, 48)):
        assert isinstance(width, torch.Tensor)
        assert width.dtype == torch.int32 and width.tolist() == [value]
