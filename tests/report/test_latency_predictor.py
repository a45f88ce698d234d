"""The latency predictor against costs that are known: exact where they add up as it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert import DynaBertConfig, DynaBertModel, latency_predictor
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable
from dynabert.latency_predictor import (
    LatencyPredictor,
    OpTable,
    build_predictor,
    fit_predictor,
    knots,
    measure_ops,
    random_subnets,
)
from dynabert.latency_table import hardware_name, package_versions
from dynabert.subnet import LayerShape, SubnetConfig, SubnetShape
from dynabert_kernels.timing import Timing

SETTING = LatencySetting(
    hardware_name("cpu"), "cpu", 1, "auto (cpu)", "float32", 3, 7, "toy", package_versions()
)
ATTENTION = OpTable((1, 2, 3, 4), (0.3, 0.5, 0.6, 0.9))
FFN = OpTable((16, 48, 112), (0.2, 0.4, 1.2), panel=16)


@pytest.fixture
def model() -> DynaBertModel:
    config = DynaBertConfig(
        vocab_size=31,
        hidden_size=20,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=112,
        max_position_embeddings=9,
    )
    return DynaBertModel(config, add_pooling_layer=False).eval()


def true_ms(shape: SubnetShape) -> float:
    """Latency of a machine whose ops take longer inside a model, by factors the fit has to find."""
    return 2.0 + sum(
        0.1 + 1.25 * ATTENTION(layer.num_heads) + 0.75 * FFN(layer.intermediate_size)
        for layer in shape.layers
    )


def timed(subnet: SubnetConfig, ms: float) -> LatencyRow:
    return LatencyRow(subnet, ms, ms, ms, ms, 20, 1.0, "2026-01-01")


def table_of(
    model: DynaBertModel, count: int, latency_of: Callable[[SubnetShape], float] = true_ms
) -> LatencyTable:
    subnets = random_subnets(model, count, seed=5)
    rows = [timed(subnet, latency_of(model.subnet_shape(subnet))) for subnet in subnets]
    return LatencyTable(SETTING, tuple(rows))


def test_a_table_is_exact_at_its_knots_and_linear_between() -> None:
    assert [ATTENTION(heads) for heads in (1, 2, 3, 4)] == [0.3, 0.5, 0.6, 0.9]
    assert FFN(80) == pytest.approx(0.8)


def test_part_of_a_panel_costs_as_much_as_all_of_it() -> None:
    assert FFN(1) == FFN(16) == 0.2
    assert FFN(65) == FFN(80) == pytest.approx(0.8)
    assert OpTable((16, 40), (1.0, 2.0), panel=16)(40) == 2.0  # the last panel is cut short


@pytest.mark.parametrize("count", [0, 113])
def test_a_table_refuses_what_the_model_does_not_have(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}, expected 1 to 112"):
        FFN(count)


def test_knots_are_whole_panels_from_one_to_all() -> None:
    assert knots(12, 1) == list(range(1, 13))
    assert knots(1536, 16) == [16, *range(96, 1537, 96)]
    assert knots(40, 16) == [16, 32, 40]
    assert len(knots(64, 1)) == 17


def test_additive_costs_are_found_exactly(model: DynaBertModel) -> None:
    table = table_of(model, 19)
    predictor = fit_predictor(model, ATTENTION, FFN, table, num_fitted=7)
    found = (predictor.fixed_ms, predictor.layer_ms)
    assert found == pytest.approx((2.0, 0.1))
    assert (predictor.attention_scale, predictor.ffn_scale) == pytest.approx((1.25, 0.75))
    assert predictor.error.num_subnets == len(table.rows) - 7
    assert predictor.error.worst < 1e-9
    uneven = SubnetShape((LayerShape(1, 3, 70), LayerShape(4, 1, 112)), (0, 2, 5))
    # 70 neurons are five panels: 80
    expected = 2 + 0.1 * 2 + 1.25 * (0.6 + 0.3) + 0.75 * (0.8 + 1.2)
    assert predictor.predict_ms(uneven) == pytest.approx(expected)


def test_the_error_is_that_of_subnets_it_was_not_fitted_to(model: DynaBertModel) -> None:
    table = table_of(model, 12)
    slow = [timed(row.subnet, row.median_ms * 1.25) for row in table.rows[10:]]
    table = LatencyTable(SETTING, (*table.rows[:10], *slow))
    error = fit_predictor(model, ATTENTION, FFN, table, num_fitted=9).error
    # One right, two predicted at 1 of 1.25.
    assert (error.num_subnets, error.mean, error.worst) == pytest.approx((3, 0.4 / 3, 0.2))
    assert "off by 13.3% on average and 20.0% at most, on 3 subnets" in error.describe()


def test_a_predictor_comes_back_from_its_file(model: DynaBertModel, tmp_path: Path) -> None:
    predictor = fit_predictor(model, ATTENTION, FFN, table_of(model, 9), num_fitted=6)
    predictor.save(tmp_path / "predictor.json")
    again = LatencyPredictor.load(tmp_path / "predictor.json", batch_size=3, backend="auto")
    assert again == predictor
    assert list(tmp_path.iterdir()) == [tmp_path / "predictor.json"]


@pytest.mark.parametrize(
    ("change", "wanted", "message"),
    [
        ({}, {"batch_size": 4, "seq_len": 7}, "measured with batch_size=3 and not 4. Measure"),
        ({}, {"backend": "cpu"}, r"backend=auto \(cpu\) and not cpu"),
        ({"hardware": "abacus"}, {}, "it was measured on abacus, and this machine has"),
        ({"versions": {"torch": "0.1"}}, {}, "it was measured with .*torch 0.1, now"),
    ],
    ids=["batch-size", "backend", "machine", "versions"],
)
def test_a_predictor_of_another_setting_is_refused(
    model: DynaBertModel,
    tmp_path: Path,
    change: dict[str, Any],
    wanted: dict[str, Any],
    message: str,
) -> None:
    table = table_of(model, 9)
    setting = LatencySetting(**{**vars(SETTING), **change})
    predictor = fit_predictor(
        model, ATTENTION, FFN, LatencyTable(setting, table.rows), num_fitted=6
    )
    path = tmp_path / "predictor.json"
    predictor.save(path)
    with pytest.raises(ValueError, match=message):
        LatencyPredictor.load(path, **wanted)
    if change:
        assert LatencyPredictor.load(path, allow_foreign=True) == predictor


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "predictor.json"
    path.write_text('{"schema": 1, "attention": {}, "ffn": {}}')
    with pytest.raises(ValueError, match=r"predictor\.json cannot be read .*Remove the file"):
        LatencyPredictor.load(path)


def test_random_subnets_fit_the_model_and_are_of_all_depths(model: DynaBertModel) -> None:
    subnets = random_subnets(model, 60, seed=1)
    assert subnets == random_subnets(model, 60, seed=1) != random_subnets(model, 60, seed=2)
    shapes = [model.subnet_shape(subnet) for subnet in subnets]
    assert {len(shape.layers) for shape in shapes} == {1, 2, 3, 4, 5}
    layers = [layer for shape in shapes for layer in shape.layers]
    assert {layer.num_heads for layer in layers} == {1, 2, 3, 4}
    assert {layer.intermediate_size for layer in layers} == set(range(16, 113, 16))


def test_every_op_of_every_layer_is_timed(
    model: DynaBertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, list[Any]] = {}

    def measure(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Timing]:
        kinds = ("attention", "ffn")
        for name, call in calls.items():
            seen = ran[name] = []
            hooks = [
                getattr(layer, kind).register_forward_hook(
                    lambda _, given, output, seen=seen: seen.append((output.shape, given[1]))
                )
                for layer in model.encoder.layer
                for kind in kinds
            ]
            call()
            for hook in hooks:
                hook.remove()
        # Five layers were run, so one takes a fifth; the median of three samples counts.
        return {name: Timing((1e6, 5.0 * int(name.split()[1]), 0.0)) for name in calls}

    monkeypatch.setattr(latency_predictor, "measure", measure)
    threads = torch.get_num_threads()
    attention, ffn = measure_ops(model, batch_size=3, seq_len=7, threads=1)
    assert torch.get_num_threads() == threads
    assert attention == OpTable((1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0))
    counts = tuple(range(16, 113, 16))
    assert ffn == OpTable(counts, tuple(map(float, counts)), panel=16)
    assert ran["attention 3"] == [((21, 20), 3)] * 5
    assert ran["ffn 48"] == [((21, 20), 48)] * 5


def test_a_predictor_is_built_of_measurements(
    model: DynaBertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def measure_latency(
        model: Any, subnets: Sequence[SubnetConfig], **options: Any
    ) -> LatencyTable:
        asked.update(options)
        rows = [timed(subnet, true_ms(model.subnet_shape(subnet))) for subnet in subnets]
        return LatencyTable(SETTING, tuple(rows))

    monkeypatch.setattr(latency_predictor, "measure_ops", lambda *_, **__: (ATTENTION, FFN))
    monkeypatch.setattr(latency_predictor, "measure_latency", measure_latency)
    predictor, table = build_predictor(
        model, batch_size=3, seq_len=7, seconds=8.0, num_fitted=6, num_checked=4, backend="cpu"
    )
    full = SubnetConfig(num_heads=(4,) * 5, intermediate_size=(112,) * 5, layers=tuple(range(5)))
    assert table.rows[0].subnet == full
    assert len({row.subnet.name for row in table.rows}) == len(table.rows) == 10
    assert (asked["batch_size"], asked["seq_len"], asked["backend"]) == (3, 7, "cpu")
    assert math.isclose(asked["seconds_per_subnet"] * 10, 4.0)
    assert predictor.error.num_subnets == 4
    assert predictor.error.worst < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_fitted": 4}, "num_fitted=4, expected 5 or more"),
        ({"num_checked": 0}, "num_checked=0, expected 1 or more"),
        ({"seconds": math.nan}, "seconds=nan, expected a positive number"),
    ],
    ids=["fitted", "checked", "seconds"],
)
def test_building_refuses_bad_input(
    model: DynaBertModel, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_predictor(model, **change)


def test_fitting_needs_subnets_to_check(model: DynaBertModel) -> None:
    with pytest.raises(ValueError, match="num_fitted=6 of 6 subnets, expected 5 or more, and some"):
        fit_predictor(model, ATTENTION, FFN, table_of(model, 6), num_fitted=6)
