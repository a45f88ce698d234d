"""Picks checked against looking at every subnet."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynabert.evaluation import GridRow
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable
from dynabert.picking import check_request, pareto_front, pick
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
    grid, table = grid_and_table((0.9, 9.0), (0.8, 7.0))
    assert pick(grid, table, 9.0).subnet == SUBNETS[0]


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
        pick(grid, table, 5.0)
    assert pick(grid, table, 7.13).subnet == SUBNETS[1]


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


@pytest.mark.parametrize("seed", range(20))
def test_picks_equal_an_exhaustive_search(seed: int) -> None:
    rng = random.Random(seed)
    cells = [(rng.randrange(5) / 10, float(rng.randrange(1, 9))) for _ in SUBNETS]
    grid, table = grid_and_table(*cells)
    budget = min(ms for _, ms in cells) + rng.randrange(4)
    choice = pick(grid, table, budget)
    for score, ms in cells:
        if ms <= budget:
            assert (choice.primary, -choice.latency_ms) >= (score, -ms)
    assert (choice.primary, choice.latency_ms) in cells


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
