"""Timing of GPU variants: graph replays, interleaved sample by sample, warm or cold L2.

A `Variant` is the work of one sample. Where possible that is one CUDA graph holding several calls
on rotating buffers: it has no launch gaps, and the rotation keeps the L2 from serving what real
use would read from memory. Event pairs around a short kernel would time the launch queue, so each
sample is enqueued behind a sleeping kernel (a backlog) and the host is always ahead.
On a CPU the same code runs with a host clock; that path exists to test the benchmarks.
`dynabert_kernels.timing` times single calls and holds the result type of both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynabert_kernels.timing import Timing

# `torch.cuda._sleep` counts SM cycles; 1.98 GHz is the H200's highest clock, so a slower clock
# only makes the backlog longer.
CYCLES_PER_MS = 1_980_000
# Written (and read) to empty a 60 MB L2.
FLUSH_BYTES = 256 * 2**20

_pools: dict[str, Any] = {}
_is_rehearsal = False


def rehearse() -> None:
    """From now on run each variant once and heat nothing up: only what is compiled counts."""
    global _is_rehearsal
    _is_rehearsal = True


def is_rehearsal() -> bool:
    """Whether this process only compiles; its times mean nothing."""
    return _is_rehearsal


@dataclass
class Variant:
    """One competitor in a comparison.

    Attributes:
        run: The work of one sample.
        calls: Calls of the measured function in one `run`.
        output: What the last call returned; a graph's static output.
        graph: The captured graph, kept alive with the variant; None when run eagerly.
        kept: What the graph reads and nothing else may keep alive: the calls with their tensors.
        notes: "graph", or why it is not one.
        backlog_ms: Least backlog of a sample: one that launches from the host needs more.
    """

    run: Callable[[], Any]
    calls: int = 1
    output: Any = None
    graph: Any = None
    kept: Any = None
    notes: str = ""
    backlog_ms: float = 0.0


def synchronize(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def eager(calls: Sequence[Callable[[], Any]]) -> Variant:
    """Variant that launches its calls from the host."""
    output = calls[-1]()

    def run() -> None:
        for call in calls:
            call()

    return Variant(run, len(calls), output, notes="eager")


def graphed(calls: Sequence[Callable[[], Any]], device: str, *, fall_back: bool = True) -> Variant:
    """Capture the calls, in order, into one CUDA graph; on a CPU, run them eagerly.

    Args:
        calls: Functions without arguments on static buffers; the last one's result is kept.
        device: "cuda" or "cpu".
        fall_back: Whether a failed capture gives an eager variant (said in its notes) or raises.
    """
    if device != "cuda":
        return eager(calls)
    # One memory pool for all graphs: they are only ever replayed one after another, so their
    # intermediates may share memory. `torch.cuda.graph` would also empty the allocator's cache at
    # each capture, which costs more than the measurement.
    if "pool" not in _pools:
        _open_pool()
    stream = _pools["stream"]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=_pools["pool"], capture_error_mode="thread_local")
            try:
                output = None
                for call in calls:
                    output = None
                    output = call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
    except Exception as error:
        torch.cuda.synchronize()
        # The allocator may still count this pool as being recorded to: the next graph opens one.
        _pools.clear()
        if not fall_back:
            raise
        variant = eager(calls)
        variant.notes = f"eager: no graph: {type(error).__name__}: {error}"[:200]
        return variant
    return Variant(graph.replay, len(calls), output, graph, tuple(calls), notes="graph")


def _open_pool() -> None:
    """Make the graphs' shared pool, and one graph that keeps it open when all others are gone."""
    _pools["pool"] = torch.cuda.graph_pool_handle()
    _pools["stream"] = torch.cuda.Stream()
    x = torch.zeros(32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(_pools["stream"]):
        x.add_(1.0)
        graph.capture_begin(pool=_pools["pool"], capture_error_mode="thread_local")
        kept = x + 1.0
        graph.capture_end()
    torch.cuda.synchronize()
    _pools["anchor"] = (graph, x, kept)


def is_lost(device: str) -> bool:
    """Whether an error has left this process without a usable device."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class L2Flush:
    """Empties the L2: writes one large buffer, then reads another so that dirty lines leave."""

    def __init__(self, device: str) -> None:
        self.device = device
        size = FLUSH_BYTES if device == "cuda" else 1024
        self.written = torch.empty(size, dtype=torch.int8, device=device)
        self.read = torch.ones(size // 4, dtype=torch.int32, device=device)
        self.sink = torch.zeros((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Enqueue the flush on the current stream."""
        self.written.zero_()
        torch.sum(self.read, dtype=torch.int32, dim=0, out=self.sink)


def measure(
    variants: dict[str, Variant],
    device: str,
    *,
    samples: int = 15,
    max_s: float = 4.0,
    backlog_ms: float = 0.1,
    before: Callable[[], None] | None = None,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time the variants against each other, one sample of each in turn.

    Args:
        variants: Competitors by name.
        device: "cuda" or "cpu".
        samples: Samples per variant.
        max_s: Stop early after this many seconds, with at least three samples each.
        backlog_ms: How long the device sleeps before each sample so that the host gets ahead;
            must exceed the host time of enqueuing one sample.
        before: Enqueued before each sample and not timed (an `L2Flush`).
        warmup: Untimed runs of each variant.

    Returns:
        Device time per call of each variant (host time on a CPU).
    """
    if _is_rehearsal:
        samples, warmup = 1, 0
    for variant in variants.values():
        for _ in range(warmup):
            variant.run()
    synchronize(device)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    started = time.monotonic()
    for index in range(samples):
        pairs = {}
        for name, variant in variants.items():
            if device == "cuda":
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                if before is not None:
                    before()
                if backlog_ms:
                    wait_ms = max(backlog_ms, variant.backlog_ms)
                    torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
                begin.record()
                variant.run()
                end.record()
                pairs[name] = (begin, end)
            else:
                if before is not None:
                    before()
                clock = time.perf_counter()
                variant.run()
                taken[name].append((time.perf_counter() - clock) * 1e3 / variant.calls)
        synchronize(device)
        for name, (begin, end) in pairs.items():
            taken[name].append(begin.elapsed_time(end) / variants[name].calls)
        if index >= 2 and time.monotonic() - started > max_s:
            break
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def measure_host(
    run: Callable[[], Any], device: str, *, samples: int = 20, max_s: float = 2.0
) -> Timing:
    """Host wall time of `run` followed by a synchronization: the latency a caller sees."""
    if _is_rehearsal:
        samples = 1
    for _ in range(3):
        run()
    synchronize(device)
    taken = []
    started = time.monotonic()
    for index in range(samples):
        clock = time.perf_counter()
        run()
        synchronize(device)
        taken.append((time.perf_counter() - clock) * 1e3)
        if index >= 2 and time.monotonic() - started > max_s:
            break
    return Timing(tuple(taken))


def heat_up(device: str, seconds: float = 0.5) -> None:
    """Run matrix products until the clocks have left idle."""
    if device != "cuda" or _is_rehearsal:
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(20):
            torch.mm(a, a)
        torch.cuda.synchronize()


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """‖output - reference‖ / ‖reference‖ in float64; NaN where either holds a NaN."""
    difference = output.double() - reference.double()
    return float(difference.norm() / reference.double().norm())
