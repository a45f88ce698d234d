"""Serve under a deadline: the subnet of every call is the best that will be done in time.

`dynabert.runner_estimate` knows how long calls take, `dynabert.runner_queue` whose turn it is and
what all who wait can afford. docs/serving.md shows a server around this.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any, Literal

import torch
from torch import Tensor

from dynabert.evaluation import ScoredSubnet
from dynabert.flops import encoder_flops
from dynabert.latency_table import LatencyTable, describe_model
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.picking import folder_of_reports, pareto_front
from dynabert.runner_estimate import LatencyEstimate, MeasuredPoint
from dynabert.runner_queue import Choice, DeadlineQueue, WaitingCall, choose
from dynabert.subnet import SubnetConfig
from dynabert_kernels.timing import Timing, measure

IfLate = Literal["run", "raise"]
_SHAPES = ((1, 16), (1, 128), (8, 128))
_MIN_SAMPLES, _MAX_SAMPLES = 5, 20
_WARMUP_SECONDS = 0.02
_KEPT_LATENCIES = 1024  # of which the counters tell quantiles


@dataclass(frozen=True)
class RunnerOutput:
    """What a call returns.

    Attributes:
        output: What the model returned.
        subnet: What it ran.
        predicted_ms: How long that was expected to take at most, at the runner's percentile.
        latency_ms: How long it took.
        waited_ms: Time from the submission of the call until its turn came.
        deadline_met: Whether it was done in time.
    """

    output: Any
    subnet: SubnetConfig
    predicted_ms: float
    latency_ms: float
    waited_ms: float
    deadline_met: bool


@dataclass(frozen=True)
class RunnerCounters:
    """What a runner has done since it was made, or since its counters were reset.

    Attributes:
        calls: Calls that ran to their end.
        calls_by_subnet: The same by the name of the subnet, best first.
        missed: Calls that ended after their deadline.
        late: Calls that came to their turn when not even the fastest subnet would be in time.
        refused: Those of them that did not run (``if_late="raise"``).
        failed: Calls in which the model raised.
        mean_score: Mean score of the subnets that ran, over calls; None before the first.
        waiting: Calls that wait now.
        most_waiting: Most that ever waited.
        latency_ms: ``p50``, ``p95`` and ``p99`` of the time from submission to end, over the last
            1024 calls; None before the first.
        mean_correction: Mean of the correction each call was predicted with; None before the first.
        corrections: Expected over tabled latency of each subnet, now.
        margin_ms: What is added to an expected latency to reach the percentile, now.
    """

    calls: int
    calls_by_subnet: Mapping[str, int]
    missed: int
    late: int
    refused: int
    failed: int
    mean_score: float | None
    waiting: int
    most_waiting: int
    latency_ms: Mapping[str, float] | None
    mean_correction: float | None
    corrections: Mapping[str, float]
    margin_ms: float


@dataclass
class _Counts:
    """The part of `RunnerCounters` that is counted."""

    by_candidate: Counter[int] = field(default_factory=Counter)
    missed: int = 0
    late: int = 0
    refused: int = 0
    failed: int = 0
    corrections: float = 0.0
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_LATENCIES))


class ElasticRunner:
    """Runs a model on the best subnet that meets the deadline of each call.

    Calls may come from any number of threads. They run one at a time, the earliest deadline first,
    because calls that share cores make each other's time a matter of luck; so give one machine, or
    one group of pinned cores, one runner. Each is predicted from its real tokens and measured, and
    what is measured corrects the next prediction. A call takes the best subnet with which it and
    those that wait behind it are in time: under load the width falls before deadlines are missed,
    and comes back as the queue shrinks.

    Args:
        model: The model, in eval mode, where it is to run.
        budget_ms: Time for a call, from submission to end, where the call names none.
        candidates: Subnets with their scores, such as ``GridReport.rows``; None reads ``grid.json``
            beside the model. Those that are slower than a better one are left out.
        percentile: Share of the calls, in percent, that shall take no longer than predicted.
        shapes: Batches to time each candidate at before the first call: pairs of sequences and
            tokens of each. Between them latency is interpolated over the work. None for 1 x 16,
            1 x 128 and 8 x 128, as far as the model takes such lengths.
        latency: Tables measured on this machine, to use instead of timing; each holds every
            candidate.
        if_late: What to do with a call that not even the fastest candidate completes in time:
            ``"run"`` that candidate, or ``"raise"``.
        forward: What to call in the place of the model, with the same arguments.
        seconds_per_shape: Time to spend on each candidate at each shape, in seconds.
        clock: Time in seconds; `submitted_at` is a time of this clock. The default is the same in
            all processes of a machine.

    Attributes:
        candidates: What the runner chooses from, best first.
        scores: Their scores.

    Raises:
        FileNotFoundError: There is no ``grid.json`` beside the model.
        ValueError: An argument is out of range, a candidate does not fit the model, a table is of
            another machine or model or lacks a candidate, or the model is in training mode.

    Example:
        >>> runner = ElasticRunner(model, budget_ms=50)  # doctest: +SKIP
        >>> result = runner(**tokenizer(texts, return_tensors="pt", padding=True))  # doctest: +SKIP
        >>> result.output.logits, result.subnet.name, result.latency_ms  # doctest: +SKIP
    """

    def __init__(
        self,
        model: DynaBertPreTrainedModel,
        budget_ms: float,
        *,
        candidates: Sequence[ScoredSubnet] | None = None,
        percentile: float = 99.0,
        shapes: Sequence[tuple[int, int]] | None = None,
        latency: Sequence[LatencyTable] = (),
        if_late: IfLate = "run",
        forward: Callable[..., Any] | None = None,
        seconds_per_shape: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_positive("budget_ms", budget_ms, "milliseconds")
        _check_positive("seconds_per_shape", seconds_per_shape, "seconds")
        if not 50 <= percentile < 100:
            raise ValueError(
                f"ElasticRunner: percentile={percentile}, expected 50 to below 100. "
                "99 makes one call of a hundred take longer than predicted."
            )
        if if_late not in ("run", "raise"):
            raise ValueError(f"ElasticRunner: if_late={if_late!r}, expected 'run' or 'raise'.")
        if model.training:
            raise ValueError("ElasticRunner: model is in training mode. Call model.eval() first.")
        self.budget_ms = budget_ms
        self.if_late = if_late
        self._model = model
        self._forward: Callable[..., Any] = model if forward is None else forward
        self._device = model.device  # to look it up takes 60 us
        self._clock = clock
        self._attention_share: float = _attention_share(model)
        rows = _scored(model, candidates)
        subnets = [row.subnet for row in rows]
        if latency:
            points, errors_ms = self._read_tables(latency, subnets)
        else:
            shapes = _shapes(model) if shapes is None else shapes
            points, errors_ms = self._measure(shapes, subnets, seconds_per_shape)
        # What is slower than a better one at every shape would never be chosen.
        useful = {
            index
            for point in points
            for index in pareto_front(
                [(ms, row.primary) for ms, row in zip(point.latency_ms, rows, strict=True)]
            )
        }
        kept = sorted(useful, key=lambda index: -rows[index].primary)
        self.candidates = tuple(subnets[index] for index in kept)
        self.scores = tuple(rows[index].primary for index in kept)
        points = [
            MeasuredPoint(point.work, tuple(point.latency_ms[index] for index in kept))
            for point in points
        ]
        self._estimate = LatencyEstimate(points, percentile=percentile, errors_ms=errors_ms)
        self._queue = DeadlineQueue()
        self._lock = threading.Lock()  # over the next one, and over changes of the estimate
        self._counts = _Counts()
        if latency:  # the first call of a subnet may also prepare weights or compile
            batch = self._random_batch(1, min(16, model.config.max_seq_len))
            for subnet in self.candidates:
                self._run(batch, subnet)

    def __call__(
        self,
        *,
        deadline_ms: float | None = None,
        submitted_at: float | None = None,
        waiting: float = 0.0,
        **inputs: Any,
    ) -> RunnerOutput:
        """Run the model on a batch, without gradients; returns when the output is there.

        Args:
            deadline_ms: Time for this call, from its submission to its end; None for the runner's
                ``budget_ms``. With 0 or less it is late.
            submitted_at: When it was submitted, on the runner's clock (`time.monotonic`), so that
                time it spent in a queue of the caller's counts; None for now.
            waiting: How many more calls of this size wait in such a queue; those that wait for the
                runner itself in other threads are known.
            **inputs: What the model takes, without ``subnet``.

        Raises:
            TimeoutError: Not even the fastest candidate would be in time, and ``if_late`` is
                ``"raise"``.
            TypeError: `inputs` hold a subnet, or neither ``input_ids`` nor ``inputs_embeds``.
            ValueError: `deadline_ms` is not a number, or `waiting` negative.
        """
        submitted_at = self._clock() if submitted_at is None else submitted_at
        deadline_ms = self.budget_ms if deadline_ms is None else deadline_ms
        if not math.isfinite(deadline_ms) or not 0 <= waiting < math.inf:
            raise ValueError(
                f"ElasticRunner: deadline_ms={deadline_ms}, waiting={waiting}, expected a number "
                "of milliseconds and 0 or more calls."
            )
        if "subnet" in inputs:
            raise TypeError(
                "ElasticRunner: subnet is chosen by the runner. Call the model to run a given one."
            )
        table_ms = self._estimate.table_ms(self._work(inputs))
        call = WaitingCall(submitted_at + deadline_ms / 1e3, table_ms, waiting)
        with self._queue.turn(call):
            started = self._clock()
            estimate = self._estimate
            behind = self._queue.next_calls()
            choice = choose(started, call, behind, estimate.factors, estimate.margin_ms)
            if not choice.fits:
                self._count_late(call, choice, started)
            try:
                output = self._run(inputs, self.candidates[choice.candidate])
            except BaseException:
                with self._lock:
                    self._counts.failed += 1
                raise
            ended = self._clock()
            latency_ms = (ended - started) * 1e3
            self._learn(choice, call, latency_ms, (ended - submitted_at) * 1e3, ended)
        return RunnerOutput(
            output=output,
            subnet=self.candidates[choice.candidate],
            predicted_ms=choice.predicted_ms,
            latency_ms=latency_ms,
            waited_ms=(started - submitted_at) * 1e3,
            deadline_met=ended <= call.deadline,
        )

    def predict_ms(self, batch_size: int, seq_len: int) -> dict[str, float]:
        """How long a batch would take at most, at the runner's percentile, by name of the subnet.

        Args:
            batch_size: Sequences.
            seq_len: Real tokens of each.
        """
        table_ms = self._estimate.table_ms(self._work_of([seq_len] * batch_size))
        with self._lock:
            factors, margin_ms = self._estimate.factors, self._estimate.margin_ms
        return {
            subnet.name: ms * factor + margin_ms
            for subnet, ms, factor in zip(self.candidates, table_ms, factors, strict=True)
        }

    def counters(self) -> RunnerCounters:
        """What happened so far, all of one moment; `dataclasses.asdict` makes it ready for JSON."""
        with self._lock:
            counts, by_candidate = self._counts, Counter(self._counts.by_candidate)
            times = Timing(tuple(counts.latencies_ms))
            calls = by_candidate.total()
            scored = sum(self.scores[index] * number for index, number in by_candidate.items())
            names = [subnet.name for subnet in self.candidates]
            return RunnerCounters(
                calls=calls,
                calls_by_subnet={name: by_candidate[index] for index, name in enumerate(names)},
                missed=counts.missed,
                late=counts.late,
                refused=counts.refused,
                failed=counts.failed,
                mean_score=scored / calls if calls else None,
                waiting=len(self._queue),
                most_waiting=self._queue.most_waiting,
                latency_ms={f"p{p}": times.percentile_ms(p) for p in (50, 95, 99)}
                if calls
                else None,
                mean_correction=counts.corrections / calls if calls else None,
                corrections=dict(zip(names, self._estimate.factors, strict=True)),
                margin_ms=self._estimate.margin_ms,
            )

    def reset_counters(self) -> None:
        """Count from zero again; what was learnt about latency stays."""
        with self._lock:
            self._counts = _Counts()
            self._queue.most_waiting = 0

    def _run(self, inputs: Mapping[str, Any], subnet: SubnetConfig) -> Any:
        with torch.inference_mode():
            output = self._forward(**inputs, subnet=subnet)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return output

    def _count_late(self, call: WaitingCall, choice: Choice, now: float) -> None:
        """Count a call that will be late, and refuse it if that is the policy."""
        slack_ms = (call.deadline - now) * 1e3
        with self._lock:
            self._counts.late += 1
            if self.if_late == "run":
                return
            self._counts.refused += 1
            if call.table_ms[choice.candidate] <= slack_ms:
                # Only what was learnt says so, and refused calls would never teach otherwise.
                self._estimate.relax()
        raise TimeoutError(
            f"ElasticRunner: {max(slack_ms, 0.0):.3g} ms are left of the deadline, expected at "
            f"least {choice.predicted_ms:.3g} for {self.candidates[choice.candidate].name}. "
            "Allow more time, or send less."
        )

    def _learn(
        self, choice: Choice, call: WaitingCall, latency_ms: float, total_ms: float, ended: float
    ) -> None:
        table_ms = call.table_ms[choice.candidate]
        with self._lock:
            if table_ms > 0 < latency_ms:  # an empty batch teaches nothing
                self._estimate.observe(choice.candidate, table_ms, latency_ms)
            self._counts.corrections += choice.factor
            self._counts.by_candidate[choice.candidate] += 1
            self._counts.missed += ended > call.deadline
            self._counts.latencies_ms.append(total_ms)

    def _work(self, inputs: Mapping[str, Any]) -> float:
        """Work of a batch from the shapes of its tensors; see `dynabert.runner_estimate`."""
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return self._work_of(torch.count_nonzero(mask, dim=1).tolist())
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            raise TypeError(
                "ElasticRunner: expected input_ids [batch_size, seq_len] or inputs_embeds. Pass "
                "what the model takes, by name."
            )
        return self._work_of([tokens.shape[1]] * tokens.shape[0])

    def _work_of(self, lengths: Sequence[int]) -> float:
        num_pairs: int = sum(map(mul, lengths, lengths))
        return sum(lengths) + self._attention_share * num_pairs

    def _random_batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, seq_len)
        ids = torch.randint(self._model.config.vocab_size, size, generator=generator)
        ids = ids.to(self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _measure(
        self, shapes: Sequence[tuple[int, int]], subnets: Sequence[SubnetConfig], seconds: float
    ) -> tuple[list[MeasuredPoint], list[float]]:
        """Medians of every candidate at every shape, and how far the samples are from them."""
        if not shapes or any(count < 1 for shape in shapes for count in shape):
            raise ValueError(
                f"ElasticRunner: shapes={list(shapes)}, expected at least one pair of sequences "
                "and tokens, each 1 or more."
            )
        points, errors_ms = [], []
        for batch_size, seq_len in shapes:
            batch = self._random_batch(batch_size, seq_len)
            calls = {subnet.name: partial(self._run, batch, subnet) for subnet in subnets}
            timings = measure(
                calls,
                seconds=seconds * len(calls),
                warmup_seconds=_WARMUP_SECONDS,
                min_samples=_MIN_SAMPLES,
                max_samples=_MAX_SAMPLES,
                clock=self._clock,
            )
            medians = tuple(timings[subnet.name].median_ms for subnet in subnets)
            points.append(MeasuredPoint(self._work_of([seq_len] * batch_size), medians))
            for timing in timings.values():
                errors_ms += [ms - timing.median_ms for ms in timing.samples_ms]
        return points, errors_ms

    def _read_tables(
        self, tables: Sequence[LatencyTable], subnets: Sequence[SubnetConfig]
    ) -> tuple[list[MeasuredPoint], list[float]]:
        points, errors_ms = [], []
        for table in tables:
            setting = table.setting
            why_not = setting.why_not_here()
            if setting.model != describe_model(self._model):
                why_not = f"it is of {setting.model}"
            elif setting.threads != torch.get_num_threads():
                why_not = f"it holds for {setting.threads} threads, now {torch.get_num_threads()}"
            elif setting.lengths:
                why_not = "the lengths of its sequences vary"
            rows = [table.row(subnet) for subnet in subnets]
            missing = [
                subnet.name for subnet, row in zip(subnets, rows, strict=True) if row is None
            ]
            if missing:
                why_not = f"it lacks {', '.join(missing)}"
            if why_not is not None:
                raise ValueError(
                    f"ElasticRunner: latency holds a table that does not fit ({why_not}): "
                    f"{setting.describe()}. Leave `latency` out to have it measured."
                )
            timed = [row for row in rows if row is not None]
            work = self._work_of([setting.seq_len] * setting.batch_size)
            points.append(MeasuredPoint(work, tuple(row.median_ms for row in timed)))
            for row in timed:
                errors_ms += [ms - row.median_ms for ms in (row.p20_ms, row.p80_ms, row.p99_ms)]
        return points, errors_ms


def _scored(
    model: DynaBertPreTrainedModel, candidates: Sequence[ScoredSubnet] | None
) -> list[ScoredSubnet]:
    if candidates is None:
        from dynabert.report import GridReport

        candidates = GridReport.load(folder_of_reports(model) / "grid.json").rows
    if not candidates:
        raise ValueError("ElasticRunner: candidates=[], expected at least one scored subnet.")
    for row in candidates:
        model.subnet_shape(row.subnet)
        if row.primary is None or not math.isfinite(row.primary):
            raise ValueError(
                f"ElasticRunner: candidates: {row.subnet.name} has score {row.primary}, expected a "
                "number. Evaluate it, or leave it out."
            )
    return list(candidates)


def _shapes(model: DynaBertPreTrainedModel) -> list[tuple[int, int]]:
    longest = model.config.max_seq_len
    return list(dict.fromkeys((batch, min(length, longest)) for batch, length in _SHAPES))


def _attention_share(model: DynaBertPreTrainedModel) -> float:
    """Operations of attention per pair of tokens, over those of everything else per token."""
    full = model.subnet_shape(SubnetConfig())
    one = encoder_flops(model.config, full, seq_len=1)
    two = encoder_flops(model.config, full, seq_len=2)
    per_pair = (two - 2 * one) / 2
    return per_pair / (one - per_pair)


def _check_positive(name: str, value: float, unit: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"ElasticRunner: {name}={value}, expected a positive number of {unit}.")
