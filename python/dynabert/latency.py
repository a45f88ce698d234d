"""Measure how long each subnet takes on this machine.

What is timed is the model's forward pass end to end, token ids to logits, without padding. The
subnets take turns, one sample each, so that a machine growing slower or faster meanwhile does so
for all alike; no sample is discarded, and those far out are counted. Tables are in
`dynabert.latency_table`, their file in `dynabert.latency_file`.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dynabert.evaluation import evaluation_mode
from dynabert.latency_file import load_latency, save_latency
from dynabert.latency_lengths import Lengths, TimedBatch, make_batches
from dynabert.latency_memory import peak_memory_mib
from dynabert.latency_table import (
    LatencyRow,
    LatencySetting,
    LatencyTable,
    automatic_backend,
    describe_model,
    hardware_name,
    package_versions,
)
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert_kernels import use_backend
from dynabert_kernels.ops import forced_backend
from dynabert_kernels.timing import Timing, measure

__all__ = [
    "LatencyRow",
    "LatencySetting",
    "LatencyTable",
    "Lengths",
    "load_latency",
    "measure_latency",
    "save_latency",
]

_log = logging.getLogger(__name__)

_WARMUP_SECONDS = 0.2  # of every subnet; the clock of an idle core has settled by then
_SLICES = 10
_MIN_SAMPLES_PER_SLICE = 2  # 20 in all; fewer say nothing about the 80th percentile
_STEADY = 1.5  # p80 over p20; beyond it a row says more about the machine than about the subnet
# A sample is far out beyond five robust standard deviations of its batch, and a fifth above the
# median: less would not move a choice between subnets, which differ by a quarter and more.
_FAR_OUT = 5 * 1.4826
_LEAST_FAR_OUT = 0.2
_FEW_FAR_OUT = 0.05

Forward = Callable[[TimedBatch, SubnetConfig], None]


def measure_latency(
    model: DynaBertPreTrainedModel,
    subnets: Sequence[SubnetConfig],
    *,
    batch_size: int = 1,
    seq_len: int = 128,
    threads: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    seconds_per_subnet: float = 2.0,
    progress: bool = True,
    lengths: Lengths | None = None,
    num_samples: int | None = None,
    capture: bool = False,
) -> LatencyTable:
    """Time the forward pass of every subnet on random token ids, without padding.

    The subnets take turns, one sample each, until the time is spent. The model is in eval mode
    meanwhile; the number of threads, the backend and the mode are given back. A warning is logged
    where the times scatter so much that the machine must have been busy with something else.

    Args:
        model: The model; untouched, a copy is timed where `device` or `dtype` asks for another one.
        subnets: What to time, each once.
        batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence, all of them real; with `lengths` the most there may be.
        threads: Threads PyTorch uses on the CPU meanwhile; None leaves them as they are.
        device: Where to run; None where the model is.
        dtype: Element type of the weights and activations; None leaves the model's. ``torch.int8``
            means float32 with the matrix products in integers
            (`DynaBertPreTrainedModel.quantize`), and leaves a model that has them so.
        backend: Backend to force for every operator; None leaves the choice as it is.
        seconds_per_subnet: Time to spend on each subnet on average, in seconds, warm-up not
            included. A slow subnet takes longer, so that every subnet gets 20 samples.
        progress: Show a progress bar, on stderr, where that is a terminal.
        lengths: Lengths of real texts: the calls go through batches drawn of them, each padded to
            its longest sequence, with a mask. None: every sequence has `seq_len` tokens.
        num_samples: Samples of each subnet, whatever time they take; None: as many as the time
            allows.
        capture: Replay CUDA graphs (`DynaBertPreTrainedModel.capture`); on a GPU only.

    Returns:
        A row per subnet, in the order given.

    Raises:
        ValueError: Nothing to time, a subnet given twice or not of this model, a number below its
            least, or a device that cannot be timed.
        NotImplementedError: The forced backend cannot run the model, or not in a CUDA graph.

    Example:
        >>> table = measure_latency(model, subnet_grid(), threads=2)  # doctest: +SKIP
        >>> save_latency(table, "run/latency.json")  # doctest: +SKIP
    """
    _check(subnets, batch_size, seq_len, threads, seconds_per_subnet, num_samples)
    for subnet in subnets:
        model.subnet_shape(subnet)
    timed = _as_asked(model, device, dtype)
    where = next(timed.parameters()).device
    if where.type not in ("cpu", "cuda"):
        raise ValueError(
            f"measure_latency: device={where}, expected cpu or cuda. A call is timed to its end "
            "on these only; pass device='cpu'."
        )
    batches = make_batches(batch_size, seq_len, lengths, timed.config.vocab_size, where)
    with (
        _num_threads(threads),
        nullcontext() if backend is None else use_backend(backend),
        evaluation_mode(timed),
        torch.no_grad(),
    ):
        setting = LatencySetting(
            hardware=hardware_name(where),
            device=where.type,
            threads=torch.get_num_threads(),
            backend=forced_backend() or automatic_backend(where),
            dtype=str(_dtype(timed)).removeprefix("torch."),
            batch_size=batch_size,
            seq_len=seq_len,
            model=describe_model(timed),
            versions=package_versions(),
            lengths="" if lengths is None else lengths.capped(seq_len).describe(),
            captured=capture,
        )
        forward = _forward(timed, batches, capture)
        turns = {subnet.name: _Turns(forward, subnet, batches) for subnet in subnets}
        samples = _measure(turns, seconds_per_subnet * len(turns), num_samples, progress)
        memory = {name: None if capture else turn.peak_mib(where) for name, turn in turns.items()}
    _warn_if_busy(samples)
    rows = [_row(subnet, samples[subnet.name], batches, memory[subnet.name]) for subnet in subnets]
    return LatencyTable(setting, tuple(rows))


def _check(
    subnets: Sequence[SubnetConfig],
    batch_size: int,
    seq_len: int,
    threads: int | None,
    seconds_per_subnet: float,
    num_samples: int | None,
) -> None:
    names = [subnet.name for subnet in subnets]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"measure_latency: subnets=[{', '.join(names)}], expected at least one, each once. "
            "Leave out what is there twice."
        )
    counts = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "threads": 1 if threads is None else threads,
        "num_samples": 1 if num_samples is None else num_samples,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"measure_latency: {name}={count}, expected 1 or more.")
    if not 0 < seconds_per_subnet < float("inf"):
        raise ValueError(
            f"measure_latency: seconds_per_subnet={seconds_per_subnet}, expected a positive number "
            "of seconds."
        )


def _as_asked(
    model: DynaBertPreTrainedModel, device: torch.device | str | None, dtype: torch.dtype | None
) -> DynaBertPreTrainedModel:
    """The model itself where it already is what is asked for, else a copy."""
    weight = next(model.parameters())
    to_device = weight.device if device is None else torch.empty(0, device=device).device
    to_dtype = _dtype(model) if dtype is None else dtype
    if (to_device, to_dtype) == (weight.device, _dtype(model)):
        return model
    copied: DynaBertPreTrainedModel = copy.deepcopy(model)
    if to_dtype == _dtype(model):
        nn.Module.to(copied, device=to_device)  # transformers' own `to` is not typed
        return copied
    as_int8 = to_dtype == torch.int8
    nn.Module.to(copied, device=to_device, dtype=torch.float32 if as_int8 else to_dtype)
    return copied.quantize("int8" if as_int8 else None)


def _dtype(model: DynaBertPreTrainedModel) -> torch.dtype:
    """The element type of the matrix products: ``torch.int8`` of a quantised model."""
    return torch.int8 if model.quantization == "int8" else next(model.parameters()).dtype


def _forward(
    model: DynaBertPreTrainedModel, batches: Sequence[TimedBatch], capture: bool
) -> Forward:
    """A call as a caller sees it: on a GPU it waits once, at its end, for the device."""
    call: Callable[..., object] = model
    if capture:
        longest = max(batch.input_ids.shape[1] for batch in batches)
        call = model.capture(batches[0].input_ids.shape[0], longest)

    def forward(batch: TimedBatch, subnet: SubnetConfig) -> None:
        call(input_ids=batch.input_ids, attention_mask=batch.attention_mask, subnet=subnet)
        if batch.input_ids.is_cuda:
            torch.cuda.synchronize(batch.input_ids.device)

    return forward


class _Turns:
    """The calls of one subnet, each on the next batch.

    Attributes:
        taken: Index of the batch of each call so far.
    """

    def __init__(
        self, forward: Forward, subnet: SubnetConfig, batches: Sequence[TimedBatch]
    ) -> None:
        self._forward, self._subnet, self._batches = forward, subnet, batches
        self.taken: list[int] = []

    def __call__(self) -> None:
        index = len(self.taken) % len(self._batches)
        self._forward(self._batches[index], self._subnet)
        self.taken.append(index)

    def warm_up(self) -> None:
        end = time.perf_counter() + _WARMUP_SECONDS
        self()
        while time.perf_counter() < end:
            self()
        self.taken.clear()

    def peak_mib(self, device: torch.device) -> float | None:
        """Memory of the batch with the most tokens."""
        largest = max(self._batches, key=lambda batch: batch.num_tokens)
        return peak_memory_mib(lambda: self._forward(largest, self._subnet), device)


@dataclass(frozen=True)
class _Samples:
    """What was measured of one subnet.

    Attributes:
        timing: The samples.
        batches: Index of the batch of each.
    """

    timing: Timing
    batches: tuple[int, ...]

    def joined(self, other: _Samples) -> _Samples:
        both = Timing(self.timing.samples_ms + other.timing.samples_ms)
        return _Samples(both, self.batches + other.batches)

    def relative(self) -> Timing:
        """Each sample over the median of its batch, 1 for none: what lengths do not explain."""
        by_batch: dict[int, list[float]] = {}
        for index, ms in zip(self.batches, self.timing.samples_ms, strict=True):
            by_batch.setdefault(index, []).append(ms)
        median = {index: Timing(tuple(ms)).median_ms for index, ms in by_batch.items()}
        pairs = zip(self.batches, self.timing.samples_ms, strict=True)
        return Timing(tuple(ms / median[index] for index, ms in pairs))

    @property
    def spread(self) -> float:
        """p80 over p20, between samples of the same batch."""
        relative = self.relative()
        return relative.p80_ms / relative.p20_ms

    @property
    def outliers(self) -> float:
        """Share of the samples that are far out."""
        relative = self.relative().samples_ms
        deviation = Timing(tuple(abs(value - 1) for value in relative)).median_ms
        bound = 1 + max(_LEAST_FAR_OUT, _FAR_OUT * deviation)
        return sum(value > bound for value in relative) / len(relative)


@contextmanager
def _num_threads(count: int | None) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(former if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _measure(
    turns: Mapping[str, _Turns], seconds: float, num_samples: int | None, progress: bool
) -> dict[str, _Samples]:
    """Samples of every subnet, in slices of the time between which the bar moves.

    Each slice has another order: what ran before leaves traces in the caches, so nobody has a fixed
    neighbour. All subnets are called equally often, so they meet the same batches. Wall time on
    every device, since a caller waits for the launches too.
    """
    for turn in turns.values():
        turn.warm_up()
    names = list(turns)
    shuffle = random.Random(0).shuffle
    samples = dict.fromkeys(names, _Samples(Timing(()), ()))
    for limits in tqdm(_slices(seconds, num_samples), "latency", disable=not progress or None):
        shuffle(names)
        part = measure(
            {name: turns[name] for name in names},
            warmup_seconds=0.0,
            clock=time.perf_counter,
            **limits,
        )
        for name, timing in part.items():
            taken = tuple(turns[name].taken[-timing.num_samples :])
            samples[name] = samples[name].joined(_Samples(timing, taken))
    return samples


def _slices(seconds: float, num_samples: int | None) -> list[dict[str, Any]]:
    """How long each slice lasts, as `measure` takes it."""
    if num_samples is None:
        limits = {"seconds": seconds / _SLICES, "min_samples": _MIN_SAMPLES_PER_SLICE}
        return [limits] * _SLICES
    sizes = [(num_samples + index) // _SLICES for index in range(_SLICES)]
    return [{"seconds": 0.0, "min_samples": n, "max_samples": n} for n in sizes if n]


def _warn_if_busy(samples: Mapping[str, _Samples]) -> None:
    """A warning where times scatter, or many are far out, more than a quiet machine's would."""
    name = max(samples, key=lambda each: samples[each].spread)
    timing = samples[name].timing
    what = f"took {timing.p20_ms:.3g} to {timing.p80_ms:.3g} ms (p20 to p80)"
    if samples[name].spread <= _STEADY:
        name = max(samples, key=lambda each: samples[each].outliers)
        if samples[name].outliers <= _FEW_FAR_OUT:
            return
        what = f"took far longer than usual in {samples[name].outliers:.0%} of the calls"
    _log.warning("the machine was busy: %s %s; close other programs and measure again", name, what)


def _row(
    subnet: SubnetConfig,
    samples: _Samples,
    batches: Sequence[TimedBatch],
    peak_memory_mib: float | None,
) -> LatencyRow:
    timing = samples.timing
    if len(batches) == 1:
        calls, milliseconds = [0], timing.median_ms
    else:
        calls, milliseconds = list(samples.batches), sum(timing.samples_ms)
    tokens = sum(batches[index].num_tokens for index in calls)
    return LatencyRow(
        subnet=subnet,
        median_ms=timing.median_ms,
        p20_ms=timing.p20_ms,
        p80_ms=timing.p80_ms,
        p99_ms=timing.percentile_ms(99),
        num_samples=timing.num_samples,
        throughput=1e3 * len(calls) * len(batches[0].input_ids) / milliseconds,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        peak_memory_mib=peak_memory_mib,
        outliers=samples.outliers,
        tokens_per_second=1e3 * tokens / milliseconds,
    )
