"""`ElasticRunner` on scripted machines, whose clock only the forward pass moves, and on threads.

The scripted machine takes a given time per token. Every sequence has 8 tokens, so that time is
proportional to the runner's measure of work and its table holds exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, SubnetConfig
from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.latency_table import (
    LatencyRow,
    LatencySetting,
    LatencyTable,
    describe_model,
    hardware_name,
    package_versions,
)
from dynabert.report import build_report
from dynabert.runner import ElasticRunner, RunnerOutput

FULL, HALF, FAST = SubnetConfig(), SubnetConfig(0.5), SubnetConfig(0.25, 0.5)
MS_PER_TOKEN = {FULL.name: 5.0, HALF.name: 2.5, FAST.name: 0.5}  # 40, 20, 4 ms a sequence
SPEC = TaskSpec("toy", "classification", ("text",), ("a", "b"), ("accuracy",), "accuracy")
SCORES = {FULL: 0.9, HALF: 0.8, FAST: 0.7}


def scored(scores: dict[SubnetConfig, float]) -> list[GridRow]:
    return [GridRow(subnet, {"accuracy": s}, s, 100) for subnet, s in scores.items()]


@pytest.fixture(scope="module")
def model() -> DynaBertForSequenceClassification:
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return DynaBertForSequenceClassification(config).eval()


class Machine:
    """A clock in seconds, and a forward pass that takes its time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slowness = 1.0
        self.ran: list[str] = []

    def clock(self) -> float:
        return self.now

    def forward(
        self, input_ids: Tensor, subnet: SubnetConfig, attention_mask: Tensor | None = None
    ) -> str:
        tokens = input_ids.numel() if attention_mask is None else int(attention_mask.sum())
        self.now += tokens * MS_PER_TOKEN[subnet.name] * self.slowness / 1e3
        self.ran.append(subnet.name)
        return subnet.name

    def serve(
        self, runner: ElasticRunner, arrivals_ms: Iterable[float], deadline_ms: float
    ) -> list[RunnerOutput]:
        """Every sequence that arrives waits in one queue in front of the runner."""
        start = self.now
        pending = [start + ms / 1e3 for ms in arrivals_ms]
        results = []
        while pending:
            submitted_at = pending.pop(0)
            self.now = max(self.now, submitted_at)
            waiting = sum(other <= self.now for other in pending)
            results.append(
                runner(
                    **batch(1), submitted_at=submitted_at, deadline_ms=deadline_ms, waiting=waiting
                )
            )
        return results


def batch(size: int, padding: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(size, 8 + padding, dtype=torch.int64)
    mask[:, 8:] = 0
    return {"input_ids": torch.full_like(mask, 7), "attention_mask": mask}


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def make(
    model: DynaBertForSequenceClassification, machine: Machine
) -> Callable[..., ElasticRunner]:
    def make(**changes: Any) -> ElasticRunner:
        arguments = {
            "budget_ms": 60.0,
            "candidates": scored(SCORES),
            "shapes": [(1, 8), (4, 8)],
            "forward": machine.forward,
            "clock": machine.clock,
        }
        runner = ElasticRunner(model, **{**arguments, **changes})
        machine.ran.clear()
        return runner

    return make


def names(results: Iterable[RunnerOutput]) -> list[str]:
    return [result.subnet.name for result in results]


def test_the_best_that_fits_runs(make: Any, machine: Machine) -> None:
    runner = make()
    assert runner.candidates == (FULL, HALF, FAST)
    assert runner.scores == (0.9, 0.8, 0.7)
    assert runner.predict_ms(2, 8) == pytest.approx(
        {FULL.name: 80.0, HALF.name: 40.0, FAST.name: 8.0}
    )
    result = runner(**batch(1))
    assert (result.output, result.subnet, result.deadline_met) == (FULL.name, FULL, True)
    assert result.latency_ms == pytest.approx(40.0)
    assert result.predicted_ms == pytest.approx(40.0)
    assert result.waited_ms == 0.0
    assert runner(**batch(2)).subnet == HALF  # 80, 40
    assert runner(**batch(2, padding=9)).subnet == HALF  # only real tokens count
    assert runner(**batch(10)).subnet == FAST  # 400, 200, 40
    assert runner(**batch(1), deadline_ms=39).subnet == HALF
    assert runner(**batch(2), deadline_ms=81).subnet == FULL
    assert runner(input_ids=torch.full((2, 8), 7)).subnet == HALF  # without a mask all are
    assert machine.ran[-1] == HALF.name


def test_time_before_the_call_counts(make: Any, machine: Machine) -> None:
    runner = make()
    result = runner(**batch(1), submitted_at=machine.now - 0.030)  # 30 of 60 ms are left
    assert result.subnet == HALF
    assert result.waited_ms == pytest.approx(30.0)
    assert result.deadline_met
    assert machine.now == pytest.approx(result.latency_ms / 1e3 + machine.now - 0.020)


def test_a_burst_narrows_and_the_width_comes_back(make: Any, machine: Machine) -> None:
    """Ten sequences at once and 100 ms for each: 400, 200, 40 ms for all of them.

    With n left (itself included) and t ms gone, full needs 40 n <= 100 - t and half 20 n.
    """
    runner = make()
    results = machine.serve(runner, [0.0] * 10, deadline_ms=100)
    # n = 10 to 5 fit neither: t = 4 .. 24. n = 4, t = 24: 4 * 20 > 76. n = 3, t = 28: 60 <= 72.
    # n = 2, t = 48: 40 <= 52. n = 1, t = 68: 20 <= 32.
    assert names(results) == [FAST.name] * 7 + [HALF.name] * 3
    assert all(result.deadline_met for result in results)
    machine.now += 1.0
    assert names(machine.serve(runner, [0.0, 50.0, 100.0], deadline_ms=100)) == [FULL.name] * 3
    counters = runner.counters()
    assert counters.calls_by_subnet == {FULL.name: 3, HALF.name: 3, FAST.name: 7}
    assert (counters.calls, counters.missed, counters.late) == (13, 0, 0)
    assert counters.mean_score == pytest.approx((3 * 0.9 + 3 * 0.8 + 7 * 0.7) / 13)


@pytest.mark.parametrize("load", [1.5, 2.0, 4.0, 8.0])
def test_no_deadline_is_missed_at_a_multiple_of_the_full_networks_capacity(
    make: Any, machine: Machine, load: float
) -> None:
    """A fixed full network falls behind by (load - 1) * 40 ms a call, and misses most deadlines."""
    arrivals = [number * 40 / load for number in range(300)]
    fixed = machine.serve(make(candidates=scored({FULL: 0.9})), arrivals, deadline_ms=119)
    last_in_time = int((119 - 40) / (40 - 40 / load))
    assert sum(not result.deadline_met for result in fixed) == 300 - (last_in_time + 1)

    elastic = machine.serve(make(), arrivals, deadline_ms=119)
    assert all(result.deadline_met for result in elastic)
    # Nor is width wasted: the machine is never idle for long while something narrower than full
    # runs, so the time of all calls is nearly that of the arrivals.
    busy_ms = sum(result.latency_ms for result in elastic)
    assert busy_ms > 0.85 * arrivals[-1]


def test_a_slow_machine_is_noticed_and_its_recovery_too(make: Any, machine: Machine) -> None:
    runner = make(percentile=80)
    assert runner(**batch(1)).subnet == FULL
    machine.slowness = 2.0
    slow = [runner(**batch(1)) for _ in range(60)]
    # Full now takes 80 ms of 60: it is missed until the correction of 40 ms has passed 1.5, after
    # exp(0.35 * 0.5) = 1.19 and exp(0.65 * that + 0.35 * log 2) two calls later; half takes 40.
    assert [result.deadline_met for result in slow[:4]] == [False, False, False, True]
    assert names(slow[3:]) == [HALF.name] * 57
    assert slow[-1].predicted_ms == pytest.approx(40.0, rel=0.05)
    machine.slowness = 1.0
    fast = [runner(**batch(1)) for _ in range(60)]
    assert all(result.deadline_met for result in fast)
    assert names(fast[-40:]) == [FULL.name] * 40
    assert runner.counters().missed == 3
    assert runner.counters().corrections[FULL.name] == pytest.approx(1.0, rel=0.05)


def test_what_cannot_be_in_time_runs_at_the_fastest(make: Any) -> None:
    runner = make()
    result = runner(**batch(1), deadline_ms=3.0)
    assert (result.subnet, result.deadline_met) == (FAST, False)
    assert (runner(**batch(1), deadline_ms=-3.0)).subnet == FAST
    assert runner(**batch(1)).subnet == FULL
    counters = runner.counters()
    assert (counters.late, counters.missed, counters.refused) == (2, 2, 0)


def test_what_cannot_be_in_time_is_refused_where_asked(make: Any, machine: Machine) -> None:
    runner = make(if_late="raise")
    with pytest.raises(TimeoutError, match=r"3 ms are left .* at least 4 for w0\.25-d0\.5"):
        runner(**batch(1), deadline_ms=3.0)
    assert machine.ran == []
    counters = runner.counters()
    assert (counters.calls, counters.late, counters.refused, counters.missed) == (0, 1, 1, 0)
    # A machine that was slow for a while refuses everything, and must not do so for ever.
    machine.slowness = 100.0
    for _ in range(10):
        runner(**batch(1), deadline_ms=10_000)
    machine.slowness = 1.0
    machine.ran.clear()
    num_refused = 0
    while not machine.ran:
        try:
            runner(**batch(1))
        except TimeoutError:
            num_refused += 1
    assert 0 < num_refused < 100


def test_counters_and_their_reset(make: Any, machine: Machine) -> None:
    runner = make()
    nothing = runner.counters()
    assert (nothing.calls, nothing.mean_score, nothing.latency_ms) == (0, None, None)
    for waited_ms in (0, 10, 20):
        runner(**batch(1), submitted_at=machine.now - waited_ms / 1e3, deadline_ms=100)
    counters = runner.counters()
    assert counters.latency_ms == pytest.approx({"p50": 50.0, "p95": 59.0, "p99": 59.8})
    assert counters.mean_correction == pytest.approx(1.0)
    assert counters.corrections == pytest.approx(dict.fromkeys(MS_PER_TOKEN, 1.0))
    assert counters.margin_ms == pytest.approx(0.0, abs=1e-6)
    assert dataclasses.asdict(counters)["calls_by_subnet"][FULL.name] == 3
    runner.reset_counters()
    assert runner.counters() == nothing


def test_a_failing_model_is_counted_and_holds_nobody_up(make: Any, machine: Machine) -> None:
    runner = make()
    with pytest.raises(TypeError, match="colour"):
        runner(**batch(1), colour="red")
    assert runner.counters().failed == 1
    assert runner(**batch(1)).subnet == FULL


def test_what_is_slower_than_a_better_one_is_no_candidate(make: Any) -> None:
    assert make(candidates=scored({FULL: 0.9, HALF: 0.6, FAST: 0.7})).candidates == (FULL, FAST)
    assert make(candidates=scored({FAST: 0.9, FULL: 0.9})).candidates == (FAST,)


def test_threads_get_the_output_of_the_subnet_that_ran(
    model: DynaBertForSequenceClassification,
) -> None:
    """Random deadlines from 8 threads: each output is that of the model alone, to the last bit."""
    measured = table(model, (1, 8), (3, 2, 1))  # so that none drops out by chance
    runner = ElasticRunner(model, 1e4, candidates=scored(SCORES), latency=[measured])
    generator = torch.Generator().manual_seed(1)
    inputs = [
        {"input_ids": torch.randint(50, (3, length), generator=generator)} for length in (5, 9, 20)
    ]
    with torch.inference_mode():
        expected = {
            (number, subnet): model(**each, subnet=subnet).logits
            for number, each in enumerate(inputs)
            for subnet in SCORES
        }
    limits = [1e4, 0.0, *runner.predict_ms(3, 9).values()]

    def work(seed: int) -> int:
        num_wrong = 0
        for number in range(60):
            which = (seed + number) % len(inputs)
            result = runner(**inputs[which], deadline_ms=limits[number % len(limits)])
            num_wrong += not torch.equal(result.output.logits, expected[which, result.subnet])
        return num_wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0
    counters = runner.counters()
    assert counters.calls == sum(counters.calls_by_subnet.values()) == 8 * 60
    assert counters.calls_by_subnet[FULL.name] > 0 < counters.calls_by_subnet[FAST.name]
    assert counters.late >= 8 * 12  # those that had no time at all
    assert (counters.waiting, counters.failed) == (0, 0)
    assert not torch.equal(expected[0, FULL], expected[0, FAST])


def test_scores_lie_beside_the_model(
    model: DynaBertForSequenceClassification, tmp_path: Path, make: Any
) -> None:
    model.save_pretrained(tmp_path / "model")
    loaded = DynaBertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with pytest.raises(FileNotFoundError, match=r"grid\.json"):
        ElasticRunner(loaded, 10)
    build_report(loaded, scored(SCORES), SPEC).save(tmp_path / "model" / "grid.json")
    runner = ElasticRunner(loaded, 10, shapes=[(1, 8)], seconds_per_shape=1e-3)
    assert set(runner.candidates) <= {FULL, HALF, FAST}
    assert runner.candidates[0] == FULL


def table(of: Any, shape: tuple[int, int], milliseconds: Iterable[float], **changes: Any) -> Any:
    setting = LatencySetting(
        hardware=hardware_name("cpu"),
        device="cpu",
        threads=torch.get_num_threads(),
        backend="reference",
        dtype="float32",
        batch_size=shape[0],
        seq_len=shape[1],
        model=describe_model(of),
        versions=package_versions(),
    )
    rows = [
        LatencyRow(subnet, ms, ms, ms + 1, ms + 2, 20, 1e3 / ms, "2026-01-01T00:00:00+00:00")
        for subnet, ms in zip(SCORES, milliseconds, strict=False)
    ]
    return LatencyTable(dataclasses.replace(setting, **changes), tuple(rows))


def test_tables_take_the_place_of_timing(model: Any, make: Any, machine: Machine) -> None:
    tables = [table(model, (1, 8), (40, 20, 4)), table(model, (4, 8), (160, 80, 16))]
    before = machine.now
    runner = make(latency=tables)
    assert machine.now == pytest.approx(before + (5.0 + 2.5 + 0.5) * 16 / 1e3)  # one call of each
    # Errors: 0, 1 and 2 ms in equal parts, of which the 99th percentile is 2.
    assert runner.predict_ms(2, 8) == pytest.approx(
        {FULL.name: 82.0, HALF.name: 42.0, FAST.name: 10.0}
    )


@pytest.mark.parametrize(
    ("changes", "milliseconds", "reason"),
    [
        ({"hardware": "a toaster"}, (40, 20, 4), "measured on a toaster"),
        ({"threads": 99}, (40, 20, 4), "99 threads, now 1"),
        ({"model": "BERT"}, (40, 20, 4), "it is of BERT"),
        ({"lengths": "some"}, (40, 20, 4), "lengths of its sequences vary"),
        ({}, (40, 20), "it lacks w0.25-d0.5"),
    ],
    ids=["machine", "threads", "model", "lengths", "missing"],
)
def test_tables_that_do_not_hold_are_refused(
    model: Any, make: Any, changes: dict[str, Any], milliseconds: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        make(latency=[table(model, (1, 8), milliseconds, **changes)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_ms": 0}, "budget_ms=0, expected a positive number of milliseconds"),
        ({"budget_ms": float("nan")}, "budget_ms=nan"),
        ({"percentile": 100}, "percentile=100, expected 50 to below 100"),
        ({"if_late": "panic"}, "if_late='panic', expected 'run' or 'raise'"),
        ({"candidates": []}, "candidates=\\[\\], expected at least one"),
        ({"candidates": scored({FULL: float("nan")})}, "w1-d1 has score nan"),
        ({"candidates": scored({SubnetConfig(1 / 3): 0.5})}, "width_mult=0.333333 is 1.33"),
        ({"shapes": []}, "shapes=\\[\\], expected at least one pair"),
        ({"shapes": [(0, 8)]}, "shapes=\\[\\(0, 8\\)\\]"),
        ({"seconds_per_shape": 0}, "seconds_per_shape=0"),
    ],
)
def test_bad_arguments_are_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_bad_calls_are_refused(make: Any) -> None:
    runner = make()
    with pytest.raises(TypeError, match="subnet is chosen by the runner"):
        runner(**batch(1), subnet=FULL)
    with pytest.raises(TypeError, match="expected input_ids"):
        runner()
    with pytest.raises(ValueError, match="deadline_ms=nan"):
        runner(**batch(1), deadline_ms=float("nan"))
    with pytest.raises(ValueError, match="waiting=-1"):
        runner(**batch(1), waiting=-1)
    assert runner.counters().failed == 0


def test_a_model_in_training_mode_is_refused(make: Any, model: Any) -> None:
    model.train()
    try:
        with pytest.raises(ValueError, match=r"call model\.eval|Call model\.eval"):
            make()
    finally:
        model.eval()
