"""Picks checked against looking at every subnet."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynabert import DynaBertForSequenceClassification, picking
from dynabert.cli.pick import describe_pick
from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable, load_latency, save_latency
from dynabert.latency_table import describe_model, hardware_name, package_versions
from dynabert.picking import MARGIN, check_request, pareto_front, pareto_subnets, pick
from dynabert.report import build_report
from dynabert.subnet import SubnetConfig, subnet_grid

SETTING = LatencySetting("here", "cpu", 1, "reference", "float32", 1, 128, "toy", {})
SUBNETS = subnet_grid()


def timed(subnet: SubnetConfig, median_ms: float, p80_ms: float | None = None) -> LatencyRow:
    slow = median_ms if p80_ms is None else p80_ms
    return LatencyRow(subnet, median_ms, median_ms, slow, slow * 2, 99, 1.0, "2026-01-01")


def scored(subnet: SubnetConfig, primary: float) -> GridRow:
    return GridRow(subnet, {"accuracy": primary}, primary, 100)


def grid_and_table(*cells: tuple[float, float]) -> tuple[list[GridRow], LatencyTable]:
    """Rows of (score, latency in ms), largest subnet first."""
    pairs = list(zip(SUBNETS, cells, strict=False))
    return (
        [scored(subnet, score) for subnet, (score, _) in pairs],
        LatencyTable(SETTING, tuple(timed(subnet, ms) for subnet, (_, ms) in pairs)),
    )


def test_the_best_within_the_budget_is_picked() -> None:
    grid, table = grid_and_table((0.90, 20.0), (0.91, 15.0), (0.88, 9.0), (0.80, 5.0))
    choice = pick(grid, table, 10.0)
    assert (choice.subnet, choice.primary, choice.latency_ms) == (SUBNETS[2], 0.88, 9.0)
    assert (choice.budget_ms, choice.percentile, choice.untimed) == (10.0, "p80", ())
    assert pick(grid, table, 100.0).subnet == SUBNETS[1]


def test_of_equally_good_ones_the_fastest_is_picked() -> None:
    grid, table = grid_and_table((0.9, 9.0), (0.9, 7.0), (0.9, 8.0), (0.1, 1.0))
    assert pick(grid, table, 10.0).subnet == SUBNETS[1]


def test_a_budget_met_exactly_is_met() -> None:
    grid, table = grid_and_table((0.9, 8.0), (0.8, 7.0))
    assert pick(grid, table, 8.0, margin=0).subnet == SUBNETS[0]
    assert pick(grid, table, 10.0, margin=0.25).subnet == SUBNETS[0]


def test_the_margin_is_kept_free() -> None:
    grid, table = grid_and_table((0.9, 10.0), (0.8, 7.0))
    choice = pick(grid, table, 10.0)
    assert (choice.subnet, choice.margin, choice.is_within) == (SUBNETS[1], MARGIN, True)
    assert pick(grid, table, 10.0 * (1 + MARGIN)).subnet == SUBNETS[0]
    for function in (pick, DynaBertForSequenceClassification.pick):
        assert inspect.signature(function).parameters["margin"].default == MARGIN


@pytest.mark.parametrize(
    ("percentile", "expected"), [("median", 0), ("p20", 0), ("p80", 1), ("p99", 2)]
)
def test_the_percentile_decides(percentile: Any, expected: int) -> None:
    grid = [scored(subnet, 0.9 - 0.1 * i) for i, subnet in enumerate(SUBNETS[:3])]
    table = LatencyTable(
        SETTING,
        (
            timed(SUBNETS[0], 8.0, 12.0),
            timed(SUBNETS[1], 7.0, 9.0),
            timed(SUBNETS[2], 4.0, 4.5),
        ),
    )
    assert pick(grid, table, 10.0, percentile).subnet == SUBNETS[expected]


def test_no_fit_names_the_fastest_and_a_budget_that_works() -> None:
    grid, table = grid_and_table((0.9, 9.0), (0.8, 7.123))
    with pytest.raises(ValueError, match=r"expected at least 7\.13\. .*w0\.75-d1, takes 7\.12 ms"):
        pick(grid, table, 5.0, margin=0)
    assert pick(grid, table, 7.13, margin=0).subnet == SUBNETS[1]
    with pytest.raises(ValueError, match=r"expected at least 7\.84\. .*\(p80\), and 0\.1 of that"):
        pick(grid, table, 5.0, margin=0.1)


def test_the_fastest_is_taken_on_request_and_marked() -> None:
    grid, table = grid_and_table((0.9, 9.0), (0.8, 7.0), (0.7, 8.0))
    choice = pick(grid, table, 5.0, if_none="fastest")
    assert (choice.subnet, choice.latency_ms, choice.is_within) == (SUBNETS[1], 7.0, False)
    assert pick(grid, table, 100.0, if_none="fastest").is_within


def test_subnets_without_latency_are_no_candidates_and_are_named() -> None:
    grid, table = grid_and_table((0.9, 9.0), (0.8, 7.0))
    choice = pick([*grid, scored(SUBNETS[5], 0.99)], table, 10.0)
    assert (choice.subnet, choice.untimed) == (SUBNETS[0], (SUBNETS[5].name,))
    with pytest.raises(ValueError, match=r"grid=\[w0\.75-d0\.75\]"):
        pick([scored(SUBNETS[5], 0.99)], table, 10.0)


def test_subnets_match_across_rounded_fractions() -> None:
    grid = [scored(SubnetConfig(0.5, 0.6667), 0.9)]
    table = LatencyTable(SETTING, (timed(SubnetConfig(0.5, 2 / 3), 3.0),))
    assert pick(grid, table, 4.0).latency_ms == 3.0


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_budgets_that_are_no_time_are_refused(budget: float) -> None:
    grid, table = grid_and_table((0.9, 9.0))
    with pytest.raises(ValueError, match="positive number of milliseconds"):
        pick(grid, table, budget)


def test_unknown_percentiles_are_refused() -> None:
    grid, table = grid_and_table((0.9, 9.0))
    with pytest.raises(ValueError, match="expected one of median, p20, p80, p99"):
        pick(grid, table, 9.0, "p50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="percentile='mean'"):
        check_request(9.0, "mean")
    with pytest.raises(ValueError, match="if_none='slowest', expected raise or fastest"):
        check_request(9.0, if_none="slowest")
    with pytest.raises(ValueError, match=r"margin=-0\.1, expected a share of 0 or more"):
        check_request(9.0, margin=-0.1)


UNEVEN = [
    SubnetConfig(num_heads=(1, 4), intermediate_size=(7, 28), layers=(0, 2)),
    SubnetConfig(num_heads=(3,), intermediate_size=(14,), layers=(1,)),
]
CELLS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=len(SUBNETS) + 2
)


@settings(max_examples=50, deadline=None)
@given(CELLS, st.integers(1, 12), st.sampled_from([0.0, 0.25]))
def test_picks_equal_an_exhaustive_search(
    cells: list[tuple[int, int]], budget: int, margin: float
) -> None:
    subnets = [*UNEVEN, *SUBNETS]  # uneven ones are candidates like all others
    grid = [scored(subnet, score / 10) for subnet, (score, _) in zip(subnets, cells, strict=False)]
    table = LatencyTable(
        SETTING, tuple(timed(subnet, ms) for subnet, (_, ms) in zip(subnets, cells, strict=False))
    )
    choice = pick(grid, table, budget, if_none="fastest", margin=margin)
    within = [(-score / 10, ms) for score, ms in cells if ms * (1 + margin) <= budget]
    assert choice.is_within == bool(within)
    if within:
        assert (-choice.primary, choice.latency_ms) == min(within)
    else:
        assert choice.latency_ms == min(ms for _, ms in cells)
    assert (round(choice.primary * 10), choice.latency_ms) in cells


@settings(max_examples=50, deadline=None)
@given(CELLS)
def test_every_pick_is_on_the_front(cells: list[tuple[int, int]]) -> None:
    subnets = [*UNEVEN, *SUBNETS]
    pairs = list(zip(subnets, cells, strict=False))
    grid = [scored(subnet, score / 10) for subnet, (score, _) in pairs]
    table = LatencyTable(SETTING, tuple(timed(subnet, ms) for subnet, (_, ms) in pairs))
    front = [(each.primary, each.latency_ms) for each in pareto_subnets(grid, table)]
    picked = {
        (choice.primary, choice.latency_ms)
        for budget in range(1, 10)
        if (choice := pick(grid, table, budget, if_none="fastest", margin=0)).is_within
    }
    assert picked == set(front)
    assert [ms for _, ms in front] == sorted(ms for _, ms in front)


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=13)


@given(POINTS)
def test_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    unbeaten = {p for p in points if not any(beats(other, p) for other in points)}
    assert {points[i] for i in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert [points[i] for i in front] == sorted(unbeaten)


def test_front_keeps_the_first_of_equal_points() -> None:
    assert pareto_front([(2.0, 0.5), (1.0, 0.5), (1.0, 0.5)]) == [1]
    assert pareto_front([]) == []


class Stopwatch:
    """In the place of `measure_latency`: as many milliseconds as a subnet has heads."""

    def __init__(self) -> None:
        self.measured: list[list[str]] = []

    def __call__(self, model: Any, subnets: Sequence[SubnetConfig], **asked: Any) -> LatencyTable:
        self.measured.append([subnet.name for subnet in subnets])
        setting = LatencySetting(
            hardware=hardware_name("cpu"),
            device="cpu",
            threads=asked["threads"] or torch.get_num_threads(),
            backend="auto (cpu)",
            dtype="float32",
            batch_size=asked["batch_size"],
            seq_len=asked["seq_len"],
            model=describe_model(model),
            versions=package_versions(),
        )
        rows = [
            timed(
                subnet, float(sum(layer.num_heads for layer in model.subnet_shape(subnet).layers))
            )
            for subnet in subnets
        ]
        return LatencyTable(setting, tuple(rows))


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    stopwatch = Stopwatch()
    monkeypatch.setattr(picking, "measure_latency", stopwatch)
    return stopwatch


@pytest.fixture
def saved(model: DynaBertForSequenceClassification, tmp_path: Path) -> Path:
    """A run with a model of 3 layers of 4 heads, and scores of an uneven subnet and of three cells
    of its grid."""
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "run.json").write_text("{}")
    subnets = [SubnetConfig(), SubnetConfig(0.5), UNEVEN[0], SubnetConfig(0.25, 1 / 3)]
    rows = [scored(subnet, 0.9 - 0.1 * i) for i, subnet in enumerate(subnets)]
    spec = TaskSpec("toy", "classification", ("text",), ("a", "b", "c"), ("accuracy",), "accuracy")
    build_report(model, rows, spec).save(tmp_path / "run" / "grid.json")
    return tmp_path / "run"


def test_a_model_picks_from_the_files_beside_it(
    saved: Path, stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = DynaBertForSequenceClassification.from_pretrained(saved / "model")
    with caplog.at_level(logging.INFO, logger="dynabert"):
        choice = loaded.pick(budget_ms=6.5)
    assert (choice.subnet, choice.latency_ms) == (SubnetConfig(0.5), 6.0)
    assert "measuring, since there is no table to use" in caplog.text
    assert [len(names) for names in stopwatch.measured] == [4]
    table = load_latency(saved / "latency.json", seq_len=128)
    assert [row.median_ms for row in table.rows] == [12.0, 6.0, 5.0, 1.0]
    assert loaded.pick(budget_ms=100).subnet == SubnetConfig()
    assert loaded.pick(budget_ms=0.5, if_none="fastest").is_within is False
    assert len(stopwatch.measured) == 1
    assert loaded.pick(budget_ms=5.5, seq_len=7).subnet == UNEVEN[0]
    assert len(stopwatch.measured) == 2  # another setting


def test_what_the_table_lacks_is_measured_and_added(saved: Path, stopwatch: Stopwatch) -> None:
    loaded = DynaBertForSequenceClassification.from_pretrained(saved / "model")
    known = stopwatch(loaded, [SubnetConfig(0.5)], threads=None, batch_size=1, seq_len=128)
    known = replace(known, rows=(replace(known.rows[0], p80_ms=99.0),))
    save_latency(known, saved / "latency.json")
    assert loaded.pick(budget_ms=6.5).subnet == UNEVEN[0]
    assert stopwatch.measured[1] == ["w1-d1", UNEVEN[0].name, "w0.25-d0.333"]
    rows = load_latency(saved / "latency.json").rows
    assert {row.subnet.name: row.p80_ms for row in rows} == {
        "w0.5-d1": 99.0,
        "w1-d1": 12.0,
        "w0.25-d0.333": 1.0,
        UNEVEN[0].name: 5.0,
    }


def test_a_model_without_scores_says_what_is_missing(
    model: DynaBertForSequenceClassification, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        FileNotFoundError, match="the model comes from 'no file', expected a folder"
    ):
        model.pick(budget_ms=5)
    with pytest.raises(FileNotFoundError, match=r"grid\.json is missing.*Run `dynabert evaluate`"):
        model.pick(budget_ms=5, folder=tmp_path)
    with pytest.raises(ValueError, match="budget_ms=0, expected a positive number"):
        model.pick(budget_ms=0, folder=saved)


def test_a_pick_is_told_as_a_line_of_python(
    model: DynaBertForSequenceClassification,
) -> None:
    spec = TaskSpec("toy", "classification", ("text",), ("a", "b", "c"), ("accuracy",), "accuracy")
    cells = [scored(UNEVEN[0], 0.75), scored(SubnetConfig(0.5, 2 / 3), 0.5)]
    report = build_report(model, cells, spec)
    table = LatencyTable(SETTING, (timed(UNEVEN[0], 4.0), timed(SubnetConfig(0.5, 2 / 3), 2.0)))
    text = describe_pick(pick(report.rows, table, 5.0), report)
    assert "heads 1/4, neurons 7/28, layers 0/2: accuracy 0.7500, 4.00 ms (p80)" in text
    assert text.endswith(
        "SubnetConfig(num_heads=(1, 4), intermediate_size=(7, 28), layers=(0, 2)))"
    )
    text = describe_pick(pick(report.rows, table, 1.0, if_none="fastest"), report)
    assert text.startswith("NOTHING is within 1 ms; the fastest: width 0.5, depth 2/3:")
    assert text.endswith("SubnetConfig(width_mult=0.5, depth_mult=2/3))")
