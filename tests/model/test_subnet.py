"""Subnets: fractions become whole heads, neurons and layers, or are refused with what would do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynabert.subnet import (
    LayerShape,
    SubnetConfig,
    SubnetShape,
    default_depths,
    default_widths,
    subnet_grid,
)


def resolve(config: SubnetConfig, layers: int = 12, rule: str = "paper") -> SubnetShape:
    return config.resolve(
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=3072,
        depth_rule=rule,
    )


def kept(config: SubnetConfig, layers: int, rule: str) -> list[int]:
    return [layer.index for layer in resolve(config, layers, rule).layers]


# Kept layers as the paper (keep last) and the original code (keep first) have them, by hand.
KEPT = [
    (12, 0.75, "paper", [0, 1, 3, 4, 5, 7, 8, 9, 11]),
    (12, 0.5, "paper", [1, 3, 5, 7, 9, 11]),
    (12, 0.75, "reference", [0, 1, 2, 4, 5, 6, 8, 9, 10]),
    (12, 0.5, "reference", [0, 2, 4, 6, 8, 10]),
    (6, 2 / 3, "paper", [0, 2, 3, 5]),
    (6, 0.5, "paper", [1, 3, 5]),
    (6, 0.5, "reference", [0, 2, 4]),
    (6, 1.0, "paper", [0, 1, 2, 3, 4, 5]),
    (1, 1.0, "paper", [0]),
]


@pytest.mark.parametrize(("layers", "depth", "rule", "expected"), KEPT)
def test_depth_keeps_the_layers_of_the_rule(
    layers: int, depth: float, rule: str, expected: list[int]
) -> None:
    assert kept(SubnetConfig(depth_mult=depth), layers, rule) == expected


@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_targets_are_the_same_states_under_both_rules(rule: str) -> None:
    shape = resolve(SubnetConfig(depth_mult=0.75), rule=rule)
    assert shape.hidden_targets == (0, 1, 2, 4, 5, 6, 8, 9, 10, 12)
    assert resolve(SubnetConfig(depth_mult=0.5), rule=rule).hidden_targets == tuple(range(0, 13, 2))


@pytest.mark.parametrize(
    ("width", "heads", "neurons"),
    [(1, 12, 3072), (0.75, 9, 2304), (0.5, 6, 1536), (0.25, 3, 768), (1 / 12, 1, 256)],
)
def test_width_gives_whole_heads_and_neurons(width: float, heads: int, neurons: int) -> None:
    layers = resolve(SubnetConfig(width_mult=width)).layers
    assert {(layer.num_heads, layer.intermediate_size) for layer in layers} == {(heads, neurons)}


@pytest.mark.parametrize("width", [2 / 3, 0.6667, 0.66666, 5 / 6, 0.8333, Fraction(2, 3)])
def test_rounded_fractions_are_understood(width: float) -> None:
    heads = resolve(SubnetConfig(width_mult=width)).layers[0].num_heads
    assert heads == round(float(width) * 12)


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (SubnetConfig(0.3), 12, r"width_mult=0.3 is 3.6 of 12 heads.*1/4, 1/3, .*11/12, 1\."),
        (SubnetConfig(1.0, 0.75), 6, r"depth_mult=0.75 is 4.5 of 6 layers.*1/6, 1/3, 1/2, 2/3"),
        (SubnetConfig(0.01), 12, "width_mult=0.01"),
        (SubnetConfig(0.667), 12, "width_mult=0.667 is 8.004 of 12 heads"),
        (SubnetConfig(num_heads=13), 12, "num_heads=13, expected 1 to 12"),
        (SubnetConfig(intermediate_size=4096), 12, "intermediate_size=4096, expected 1 to 3072"),
        (SubnetConfig(num_heads=(1, 2)), 12, r"num_heads has 2 values.*kept layer \(12\)"),
        (SubnetConfig(layers=(0, 12)), 12, "expected indices from 0 to 11"),
    ],
)
def test_what_does_not_fit_is_refused(config: SubnetConfig, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(config, layers)


def test_neurons_that_are_not_whole_are_refused_with_the_widths_that_are() -> None:
    with pytest.raises(ValueError, match=r"76.5 of 102 neurons.*Use one of 1/2, 1, or set"):
        SubnetConfig(0.75).resolve(
            num_hidden_layers=2, num_attention_heads=4, intermediate_size=102
        )


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"width_mult": 0}, ValueError),
        ({"width_mult": 1.5}, ValueError),
        ({"width_mult": math.nan}, ValueError),
        ({"depth_mult": -1}, ValueError),
        ({"width_mult": "0.5"}, TypeError),
        ({"width_mult": True}, TypeError),
        ({"num_heads": 0}, ValueError),
        ({"num_heads": 1.5}, TypeError),
        ({"num_heads": True}, TypeError),
        ({"num_heads": ()}, ValueError),
        ({"intermediate_size": (3, 0)}, ValueError),
        ({"layers": ()}, ValueError),
        ({"layers": (2, 1)}, ValueError),
        ({"layers": (1, 1)}, ValueError),
        ({"layers": (-1,)}, ValueError),
        ({"layers": 3}, TypeError),
    ],
)
def test_impossible_fields_are_refused_at_once(
    arguments: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"SubnetConfig: {next(iter(arguments))}"):
        SubnetConfig(**arguments)  # type: ignore[arg-type]


def test_an_unknown_depth_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="depth_rule='last'"):
        resolve(SubnetConfig(), rule="last")


def test_explicit_counts_override_the_fractions() -> None:
    config = SubnetConfig(0.5, 0.5, num_heads=(1, 5), intermediate_size=700, layers=(3, 9))
    shape = resolve(config)
    assert shape.layers == (LayerShape(3, 1, 700), LayerShape(9, 5, 700))
    assert shape.hidden_targets == (0, 4, 10)
    assert config.name == "h1.5-i700-l3.9"


def test_equal_subnets_serve_as_one_key() -> None:
    assert resolve(SubnetConfig(0.5)) == resolve(SubnetConfig(width_mult=0.5))
    assert hash(resolve(SubnetConfig(0.5))) == hash(resolve(SubnetConfig(width_mult=0.5)))
    assert len({SubnetConfig(0.5), SubnetConfig(0.5, 1.0), SubnetConfig(0.5, 0.5)}) == 2


def test_grid_is_ordered_by_depth_then_width_largest_first() -> None:
    names = [subnet.name for subnet in subnet_grid((0.5, 1.0), (0.5, 1.0, 2 / 3))]
    assert names == ["w1-d1", "w0.5-d1", "w1-d0.667", "w0.5-d0.667", "w1-d0.5", "w0.5-d0.5"]
    assert len(subnet_grid()) == 12


def test_default_widths_are_whole_in_every_layer() -> None:
    assert default_widths((12, 8, 4)) == default_widths(4) == (1, 0.75, 0.5, 0.25)
    assert default_widths((12, 7)) == (1,)


def test_default_widths_and_depths_are_whole() -> None:
    assert default_widths(12) == (1.0, 0.75, 0.5, 0.25)
    assert default_widths(6) == (1.0, 4 / 6, 0.5, 1 / 6)
    assert default_depths(12) == (1.0, 0.75, 0.5)
    assert default_depths(6) == (1.0, 2 / 3, 0.5)
    assert default_depths(2) == (1.0, 0.5)
    assert default_widths(1) == default_depths(1) == (1.0,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5x0.75", SubnetConfig(0.5, 0.75)),
        ("2/3", SubnetConfig(2 / 3)),
        ("1/4x2/3", SubnetConfig(0.25, 2 / 3)),
        (" 1 ", SubnetConfig()),
        ("w0.5-d0.667", SubnetConfig(0.5, 2 / 3)),
        (".25x.5", SubnetConfig(0.25, 0.5)),
        ("h6-i1024-l0.2", SubnetConfig(num_heads=6, intermediate_size=1024, layers=(0, 2))),
        ("h6.4-i9.8-d0.5", SubnetConfig(1, 0.5, num_heads=(6, 4), intermediate_size=(9, 8))),
        ("w0.667-i7-l3", SubnetConfig(2 / 3, intermediate_size=7, layers=(3,))),
    ],
)
def test_parse(text: str, expected: SubnetConfig) -> None:
    assert SubnetConfig.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "half", "0.5x", "0.5x0.5x0.5", "1/0", "-0.5", "2", "0", "h6", "h-d1", "h0-d1"]
)
def test_parse_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match="SubnetConfig"):
        SubnetConfig.parse(text)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
def test_every_whole_share_resolves_and_its_name_can_be_typed_back(
    heads: int, of_heads: int, layers: int, of_layers: int
) -> None:
    heads, of_heads = sorted((heads, of_heads))
    layers, of_layers = sorted((layers, of_layers))
    config = SubnetConfig(heads / of_heads, layers / of_layers)
    sizes = {
        "num_hidden_layers": of_layers,
        "num_attention_heads": of_heads,
        "intermediate_size": 4 * of_heads,
    }
    for rule in ("paper", "reference"):
        shape = config.resolve(**sizes, depth_rule=rule)
        indices = [layer.index for layer in shape.layers]
        assert len(set(indices)) == layers
        assert indices == sorted(indices)
        assert indices[0] >= 0 and indices[-1] < of_layers
        assert indices[-1] == of_layers - 1 if rule == "paper" else indices[0] == 0
        assert shape.hidden_targets[0] == 0 and shape.hidden_targets[-1] == of_layers
        assert {layer.num_heads for layer in shape.layers} == {heads}
        assert {layer.intermediate_size for layer in shape.layers} == {4 * heads}
    assert SubnetConfig.parse(config.name).resolve(**sizes) == config.resolve(**sizes)


def test_dict_round_trip_through_json() -> None:
    config = SubnetConfig(2 / 3, 0.5, num_heads=(1, 2), layers=(0, 3))
    assert SubnetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SubnetConfig.from_dict({}) == SubnetConfig()
    with pytest.raises(ValueError, match=r"fields=\['with'\]"):
        SubnetConfig.from_dict({"with": 0.5})


def test_the_file_needs_only_the_standard_library() -> None:
    path = sys.modules["dynabert.subnet"].__file__
    code = (
        "import sys, runpy; before = set(sys.modules); runpy.run_path(sys.argv[1]); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "sys.exit(str(new - sys.stdlib_module_names) if new - sys.stdlib_module_names else 0)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(path)], check=True)
