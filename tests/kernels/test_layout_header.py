"""csrc/layout.h says the same as dynabert_kernels/layout.py."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

from dynabert_kernels import _extension
from dynabert_kernels.layout import PackedAttention, PackedFFN

SIZES = {"H": 2, "3": 3, "D": 5, "C": 10, "I": 7}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    reason = _extension.extension_error()
    if reason is not None:
        pytest.skip(reason)
    return _extension.cpu_extension()


def tensor_fields(packed: type[PackedAttention] | type[PackedFFN]) -> list[str]:
    return [f.name for f in dataclasses.fields(packed) if "Tensor" in str(f.type)]


def tensors(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros([SIZES[letter] for letter in shape]) for name, shape in rows}


def test_attention_names_shapes_and_elastic_axis(module: ModuleType) -> None:
    rows = module.attention_layout()
    assert [name for name, _ in rows] == tensor_fields(PackedAttention)
    weights = PackedAttention(**tensors(rows)).validate()
    half = weights.prefix(1)
    for name, shape in rows:
        assert (getattr(half, name).shape[0] == 1) == shape.startswith("H"), name


def test_ffn_names_shapes_and_elastic_axis(module: ModuleType) -> None:
    rows = module.ffn_layout()
    assert [name for name, _ in rows] == tensor_fields(PackedFFN)
    weights = PackedFFN(**tensors(rows)).validate()
    half = weights.prefix(3)
    for name, shape in rows:
        assert (getattr(half, name).shape[0] == 3) == shape.startswith("I"), name


def test_qkv_parts_are_where_packing_puts_them(module: ModuleType) -> None:
    hidden = SIZES["H"] * SIZES["D"]
    value_of = {"query": 1.0, "key": 2.0, "value": 3.0}
    square = {f"{part}_weight": torch.full((hidden, hidden), v) for part, v in value_of.items()}
    rows = {f"{part}_bias": torch.full((hidden,), v) for part, v in value_of.items()}
    packed = PackedAttention.from_hf(
        **square,
        **rows,
        out_weight=torch.zeros(hidden, hidden),
        out_bias=torch.zeros(hidden),
        norm_weight=torch.ones(hidden),
        norm_bias=torch.zeros(hidden),
        num_heads=SIZES["H"],
    )
    parts = module.qkv_parts()
    assert set(parts) == set(value_of)
    for part, index in parts.items():
        assert torch.all(packed.qkv_weight[:, index] == value_of[part]), part
        assert torch.all(packed.qkv_bias[:, index] == value_of[part]), part
