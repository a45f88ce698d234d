"""What a runner expects a call to take: interpolation, correction and the margin of its errors."""

from __future__ import annotations

import math
import random

import pytest

from dynabert.runner_estimate import WINDOW, LatencyEstimate, MeasuredPoint

POINTS = [MeasuredPoint(10.0, (4.0, 1.0)), MeasuredPoint(30.0, (8.0, 5.0))]


def predicted(estimate: LatencyEstimate, candidate: int, work: float) -> float:
    return estimate.table_ms(work)[candidate] * estimate.factors[candidate] + estimate.margin_ms


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (10.0, [4.0, 1.0]),
        (15.0, [5.0, 2.0]),
        (30.0, [8.0, 5.0]),
        (50.0, [12.0, 9.0]),
        (5.0, [3.0, 0.5]),  # the second line reaches zero at 5; half the work, half the time
    ],
    ids=["first-point", "between", "last-point", "beyond", "below"],
)
def test_table_follows_straight_lines(work: float, expected: list[float]) -> None:
    assert LatencyEstimate(POINTS, percentile=99).table_ms(work) == pytest.approx(expected)


def test_table_of_one_point_is_rather_too_long() -> None:
    estimate = LatencyEstimate(POINTS[:1], percentile=99)
    assert estimate.table_ms(5.0) == [4.0, 1.0]
    assert estimate.table_ms(25.0) == pytest.approx([10.0, 2.5])


def test_table_never_falls_with_work_whatever_was_measured() -> None:
    noisy = [*POINTS, MeasuredPoint(20.0, (9.0, 3.0)), MeasuredPoint(20.0, (1.0, 3.5))]
    estimate = LatencyEstimate(noisy, percentile=99)
    assert estimate.table_ms(20.0) == pytest.approx([9.0, 3.5])
    assert estimate.table_ms(30.0) == pytest.approx([9.0, 5.0])


def test_correction_finds_a_slow_machine_in_six_calls_and_the_table_again() -> None:
    estimate = LatencyEstimate(POINTS, percentile=99)
    estimate.observe(0, 4.0, 8.0)  # log 2 is more than 0.5, which is all that one call may teach
    assert estimate.factors == pytest.approx([math.exp(0.35 * 0.5), math.exp(0.25 * 0.5)])
    for _ in range(5):
        estimate.observe(0, 4.0, 8.0)
    assert 1.8 < estimate.factors[0] < 2.0
    assert 1.5 < estimate.factors[1] < estimate.factors[0]  # what all share it has learnt too
    for _ in range(200):
        estimate.observe(1, 1.0, 1.0)
    assert estimate.factors[1] == pytest.approx(1.0, rel=0.01)
    # What candidate 0 had of its own fades while it does not run.
    assert 1.0 < estimate.factors[0] < 1.2


def test_candidates_are_told_apart() -> None:
    estimate = LatencyEstimate(POINTS, percentile=99)
    for _ in range(300):
        estimate.observe(0, 4.0, 6.0)
        estimate.observe(1, 1.0, 1.0)
    assert estimate.factors == pytest.approx([1.5, 1.0], rel=0.06)


@pytest.mark.parametrize("percentile", [80.0, 95.0, 99.0])
def test_margin_is_the_percentile_of_the_latest_errors(percentile: float) -> None:
    draw = random.Random(1)
    estimate = LatencyEstimate(POINTS, percentile=percentile)
    errors = []
    for _ in range(WINDOW + 100):
        latency_ms = 4.0 + draw.expovariate(1.0)
        errors.append(latency_ms - 4.0 * estimate.factors[0])
        estimate.observe(0, 4.0, latency_ms)
    kept = sorted(errors[-WINDOW:])
    rank = math.ceil(percentile / 100 * (WINDOW + 1))
    assert estimate.margin_ms == pytest.approx(kept[rank - 1])
    assert sum(error > estimate.margin_ms for error in kept) == WINDOW - rank


@pytest.mark.parametrize("percentile", [80.0, 95.0, 99.0])
def test_calls_exceed_their_estimate_no_more_often_than_asked(percentile: float) -> None:
    """Small and large batches, a machine that gets slower and faster, and now and then an accident
    that takes 20 ms whatever the batch."""
    draw = random.Random(2)
    estimate = LatencyEstimate(POINTS, percentile=percentile)
    num_calls, num_exceeded = 6000, 0
    for number in range(num_calls):
        slow = 1.5 if number % 2000 > 1000 else 1.0
        candidate, work = draw.randrange(2), draw.uniform(10, 60)
        table_ms = estimate.table_ms(work)[candidate]
        latency_ms = table_ms * slow * draw.lognormvariate(0, 0.1)
        latency_ms += 20.0 if draw.random() < 0.002 else 0.0
        num_exceeded += latency_ms > predicted(estimate, candidate, work)
        estimate.observe(candidate, table_ms, latency_ms)
    assert 0.5 < num_exceeded / (num_calls * (1 - percentile / 100)) < 1.35


def test_margin_begins_with_the_errors_of_the_measurement() -> None:
    assert LatencyEstimate(POINTS, percentile=80).margin_ms == 0.0
    errors = [-1.0, 2.0, 0.5, 3.0, 1.0, 0.0, -0.5, 2.5, 1.5]  # rank ceil(0.8 * 10) = 8 of 9
    assert LatencyEstimate(POINTS, percentile=80, errors_ms=errors).margin_ms == 2.5
    assert LatencyEstimate(POINTS, percentile=99, errors_ms=errors).margin_ms == 3.0
    many = [float(number % 2) for number in range(3 * WINDOW)]
    assert LatencyEstimate(POINTS, percentile=95, errors_ms=many).margin_ms == 1.0


def test_one_accident_leaves_no_margin_at_the_99th_percentile() -> None:
    estimate = LatencyEstimate(POINTS, percentile=99)
    for _ in range(WINDOW):
        estimate.observe(0, 4.0, 4.0)
    estimate.observe(0, 4.0, 2000.0)
    for _ in range(40):
        estimate.observe(0, 4.0, 4.0)
    assert predicted(estimate, 0, 10.0) < 4.1


def test_refusals_lead_back_to_the_table() -> None:
    estimate = LatencyEstimate(POINTS, percentile=99)
    for _ in range(10):
        estimate.observe(0, 4.0, 400.0)
    before = predicted(estimate, 0, 10.0)
    assert before > 300
    estimate.relax()
    assert predicted(estimate, 0, 10.0) < before
    for _ in range(150):
        estimate.relax()
    assert predicted(estimate, 0, 10.0) == pytest.approx(4.0, rel=0.05)
