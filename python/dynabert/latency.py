"""Measure how long each subnet takes on this machine.

What is timed is the model's forward pass end to end, token ids to logits, without padding. The
subnets take turns, one sample each, so that a machine growing slower or faster meanwhile does so
for all alike; no sample is discarded. Tables and their file are in `dynabert.latency_table`.
"""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dynabert.evaluation import evaluation_mode
from dynabert.latency_table import (
    LatencyRow,
    LatencySetting,
    LatencyTable,
    describe_model,
    hardware_name,
    load_latency,
    package_versions,
    save_latency,
)
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig
from dynabert_kernels import use_backend
from dynabert_kernels.ops import OPS, forced_backend
from dynabert_kernels.timing import Timing, measure

__all__ = [
    "LatencyRow",
    "LatencySetting",
    "LatencyTable",
    "load_latency",
    "measure_latency",
    "save_latency",
]

_log = logging.getLogger(__name__)

_WARMUP_SECONDS = 0.2  # of every subnet; the clock of an idle core has settled by then
_SLICES = 10
_MIN_SAMPLES_PER_SLICE = 2  # 20 in all; fewer say nothing about the 80th percentile
_STEADY = 1.5  # p80 over p20; beyond it a row says more about the machine than about the subnet


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
) -> LatencyTable:
    """Time the forward pass of every subnet on random token ids, without padding.

    The subnets take turns, one sample each, until the time is spent. The model is in eval mode
    meanwhile; the number of threads, the backend and the mode are given back. A warning is logged
    where the times scatter so much that the machine must have been busy with something else.

    Args:
        model: The model; untouched, a copy is timed where `device` or `dtype` asks for another one.
        subnets: What to time, each once.
        batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence, all of them real.
        threads: Threads PyTorch uses on the CPU meanwhile; None leaves them as they are.
        device: Where to run; None where the model is.
        dtype: Element type of the weights and activations; None leaves the model's. ``torch.int8``
            means float32 with the matrix products in integers
            (`DynaBertPreTrainedModel.quantize`), and leaves a model that has them so.
        backend: Backend to force for every operator; None leaves the choice as it is.
        seconds_per_subnet: Time to spend on each subnet on average, in seconds, warm-up not
            included. A slow subnet takes longer, so that every subnet gets 20 samples.
        progress: Show a progress bar, on stderr, where that is a terminal.

    Raises:
        ValueError: Nothing to time, a subnet given twice or not of this model, or a number below
            its least.
        NotImplementedError: The forced backend cannot run the model.

    Example:
        >>> table = measure_latency(model, subnet_grid(), threads=2)  # doctest: +SKIP
        >>> save_latency(table, "run/latency.json")  # doctest: +SKIP
    """
    _check(subnets, batch_size, seq_len, threads, seconds_per_subnet)
    for subnet in subnets:
        model.subnet_shape(subnet)
    timed = _as_asked(model, device, dtype)
    where = next(timed.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(timed.config.vocab_size, (batch_size, seq_len), generator=generator)
    ids = ids.to(where)
    calls = {subnet.name: _forward_call(timed, ids, subnet) for subnet in subnets}
    with (
        _num_threads(threads),
        nullcontext() if backend is None else use_backend(backend),
        evaluation_mode(timed),
        torch.no_grad(),
    ):
        setting = _setting(timed, where, batch_size, seq_len)
        timings = _measure(calls, seconds_per_subnet * len(calls), progress)
    rows = [_row(subnet, timings[subnet.name], batch_size) for subnet in subnets]
    unsteady = max(rows, key=lambda row: row.p80_ms / row.p20_ms)
    if unsteady.p80_ms > _STEADY * unsteady.p20_ms:
        _log.warning(
            "the machine was busy: %s took %.3g to %.3g ms (p20 to p80); close other programs and "
            "measure again",
            unsteady.subnet.name,
            unsteady.p20_ms,
            unsteady.p80_ms,
        )
    return LatencyTable(setting, tuple(rows))


def _check(
    subnets: Sequence[SubnetConfig],
    batch_size: int,
    seq_len: int,
    threads: int | None,
    seconds_per_subnet: float,
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


def _forward_call(
    model: DynaBertPreTrainedModel, ids: Tensor, subnet: SubnetConfig
) -> Callable[[], None]:
    def call() -> None:
        model(input_ids=ids, subnet=subnet)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)

    return call


@contextmanager
def _num_threads(count: int | None) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(former if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _setting(
    model: DynaBertPreTrainedModel, device: torch.device, batch_size: int, seq_len: int
) -> LatencySetting:
    return LatencySetting(
        hardware=hardware_name(device),
        device=device.type,
        threads=torch.get_num_threads(),
        backend=forced_backend() or _automatic_backend(device),
        dtype=str(_dtype(model)).removeprefix("torch."),
        batch_size=batch_size,
        seq_len=seq_len,
        model=describe_model(model),
        versions=package_versions(),
    )


def _automatic_backend(device: torch.device) -> str:
    """``auto`` and, in brackets, the best backend each operator has on the device."""
    best = {
        name: next(backend for backend, reason in op.status(device) if reason is None)
        for name, op in OPS.items()
    }
    if len(set(best.values())) == 1:
        return f"auto ({next(iter(best.values()))})"
    return f"auto ({', '.join(f'{name}: {backend}' for name, backend in best.items())})"


def _measure(
    calls: Mapping[str, Callable[[], None]], seconds: float, progress: bool
) -> dict[str, Timing]:
    """Samples of every call, in slices of the time between which the bar moves.

    Each slice has another order: what ran before leaves traces in the caches, so nobody has a fixed
    neighbour. Wall time on every device, since a caller waits for the launches too.
    """
    names = list(calls)
    shuffle = random.Random(0).shuffle
    samples: dict[str, tuple[float, ...]] = dict.fromkeys(names, ())
    for number in tqdm(range(_SLICES), desc="latency", disable=not progress or None):
        shuffle(names)
        part = measure(
            {name: calls[name] for name in names},
            seconds=seconds / _SLICES,
            warmup_seconds=_WARMUP_SECONDS if number == 0 else 0.0,
            min_samples=_MIN_SAMPLES_PER_SLICE,
            clock=time.perf_counter,
        )
        samples = {name: samples[name] + part[name].samples_ms for name in samples}
    return {name: Timing(values) for name, values in samples.items()}


def _row(subnet: SubnetConfig, timing: Timing, batch_size: int) -> LatencyRow:
    return LatencyRow(
        subnet=subnet,
        median_ms=timing.median_ms,
        p20_ms=timing.p20_ms,
        p80_ms=timing.p80_ms,
        p99_ms=timing.percentile_ms(99),
        num_samples=timing.num_samples,
        throughput=1e3 * batch_size / timing.median_ms,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
