"""The one timer: warm-up by time, then samples of all variants in turn, so drift hits all alike.

CPU samples are wall time of one call. CUDA samples are event pairs behind a backlog of work, so
that they time the device and not the launches; with `cold_cache` the L2 is overwritten before
each sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Twice the L2 of the largest card in use (B200: 126 MB), rounded up.
_FLUSH_BYTES = 256 * 2**20
# A product of this size keeps a large card busy for about a millisecond.
_BACKLOG_SIZE = 8192


@dataclass(frozen=True)
class Timing:
    """Samples of one variant.

    Attributes:
        samples_ms: Duration of each call, in milliseconds, in the order taken.
    """

    samples_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """The duration that `percent` of the samples do not exceed, linearly interpolated.

        Raises:
            ValueError: `percent` is not from 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(
                f"Timing.percentile_ms: percent={percent}, expected 0 to 100. The median is 50."
            )
        ordered = sorted(self.samples_ms)
        place = percent / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    @property
    def median_ms(self) -> float:
        """Median of the samples."""
        return self.percentile_ms(50)

    @property
    def p20_ms(self) -> float:
        """20th percentile of the samples."""
        return self.percentile_ms(20)

    @property
    def p80_ms(self) -> float:
        """80th percentile of the samples."""
        return self.percentile_ms(80)

    @property
    def num_samples(self) -> int:
        """Calls timed."""
        return len(self.samples_ms)


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    warmup_seconds: float = 0.2,
    min_samples: int = 5,
    max_samples: int = 10_000,
    cold_cache: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every variant, one sample of each in turn, until the time is up.

    Args:
        variants: What to call, by name, without arguments.
        device: Where the work runs: ``"cpu"`` or a CUDA device.
        seconds: Time to spend on samples, for all variants together.
        warmup_seconds: Time to call each variant before the first sample (at least once).
        min_samples: Samples of each variant to take even when the time is up.
        max_samples: Samples of each variant after which to stop.
        cold_cache: Overwrite the L2 cache before each sample; CUDA only.
        clock: Wall time in seconds.

    Returns:
        The samples of each variant.

    Raises:
        ValueError: Nothing to time, a count or time out of range, or an unknown device.
    """
    device = torch.device(device)
    _check(variants, device, seconds, warmup_seconds, min_samples, max_samples, cold_cache)
    sample = _cpu_sampler(clock) if device.type == "cpu" else _cuda_sampler(device, cold_cache)
    for function in variants.values():
        end = clock() + warmup_seconds
        sample(function)
        while clock() < end:
            sample(function)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    end = clock() + seconds
    count = 0
    while count < min_samples or (clock() < end and count < max_samples):
        for name, function in variants.items():
            samples[name].append(sample(function))
        count += 1
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _check(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    warmup_seconds: float,
    min_samples: int,
    max_samples: int,
    cold_cache: bool,
) -> None:
    if not variants:
        raise ValueError(
            "measure: variants={}, expected at least one. Pass functions of no argument."
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"measure: device={device}, expected cpu or cuda. No other has a timer.")
    if cold_cache and device.type != "cuda":
        raise ValueError(
            f"measure: cold_cache=True on {device}, expected a CUDA device. Leave it False."
        )
    for name, value in (("seconds", seconds), ("warmup_seconds", warmup_seconds)):
        if not 0 <= value < math.inf:
            raise ValueError(f"measure: {name}={value}, expected at least 0. Pass seconds.")
    if min_samples < 1 or max_samples < min_samples:
        raise ValueError(
            f"measure: min_samples={min_samples}, max_samples={max_samples}, expected "
            "1 <= min_samples <= max_samples. A median needs a sample."
        )


def _cpu_sampler(clock: Callable[[], float]) -> Callable[[Callable[[], object]], float]:
    def sample(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return (clock() - start) * 1e3

    return sample


def _cuda_sampler(
    device: torch.device, cold_cache: bool
) -> Callable[[Callable[[], object]], float]:
    backlog = torch.zeros(_BACKLOG_SIZE, _BACKLOG_SIZE, dtype=torch.bfloat16, device=device)
    flush: Tensor | None = None
    if cold_cache:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def sample(function: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            backlog @ backlog
            if flush is not None:
                flush.zero_()
            start.record()
            function()
            stop.record()
            stop.synchronize()
        return float(start.elapsed_time(stop))

    return sample
