from __future__ import annotations

import math
from itertools import count

import pytest
import torch

from dynabert_kernels.timing import Timing, measure


class FakeClock:
    """Time that passes only where a variant says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        def function():
            self.now += seconds

        return function


def test_samples_are_in_milliseconds_and_in_order():
    clock = FakeClock()
    durations = iter([9.0, 0.25, 0.5, 0.125])

    def function():
        clock.now += next(durations)

    timing = measure({"a": function}, seconds=0, warmup_seconds=0, min_samples=3, clock=clock)["a"]
    assert timing.samples_ms == (250.0, 500.0, 125.0)
    assert timing.median_ms == 250.0
    assert timing.num_samples == 3


def test_variants_take_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    measure(variants, seconds=0, warmup_seconds=0, min_samples=2)
    assert order == list("abc") + list("abcabc")


def test_warms_up_and_samples_by_time():
    clock = FakeClock()
    calls = count()
    spend = clock.spend(0.125)

    def function():
        next(calls)
        spend()

    timing = measure({"a": function}, seconds=1.0, warmup_seconds=0.5, min_samples=1, clock=clock)
    assert timing["a"].num_samples == 8
    assert next(calls) == 4 + 8


def test_stops_at_max_samples():
    clock = FakeClock()
    timing = measure({"a": clock.spend(0.001)}, seconds=9.0, max_samples=7, clock=clock)
    assert timing["a"].num_samples == 7


def test_takes_min_samples_when_the_time_is_up():
    clock = FakeClock()
    timing = measure({"a": clock.spend(60.0)}, seconds=0.1, min_samples=4, clock=clock)
    assert timing["a"].num_samples == 4


def test_percentiles_interpolate():
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert timing.percentile_ms(0) == 1.0
    assert timing.percentile_ms(100) == 6.0
    assert timing.median_ms == 3.5
    assert timing.p20_ms == 2.0
    assert timing.p80_ms == 5.0
    assert timing.percentile_ms(99) == pytest.approx(5.95)


@pytest.mark.parametrize("percent", [-1, 100.5, math.nan])
def test_percentile_out_of_range(percent):
    with pytest.raises(ValueError, match=r"percentile_ms: percent=.*expected 0 to 100"):
        Timing((1.0,)).percentile_ms(percent)


@pytest.mark.parametrize(
    ("variants", "arguments", "message"),
    [
        ({}, {}, "variants={}"),
        ({"a": int}, {"device": "meta"}, "device=meta"),
        ({"a": int}, {"cold_cache": True}, "cold_cache=True on cpu"),
        ({"a": int}, {"seconds": -1.0}, "seconds=-1.0"),
        ({"a": int}, {"seconds": math.inf}, "seconds=inf"),
        ({"a": int}, {"warmup_seconds": -0.1}, "warmup_seconds=-0.1"),
        ({"a": int}, {"min_samples": 0}, "min_samples=0"),
        ({"a": int}, {"min_samples": 9, "max_samples": 8}, "max_samples=8"),
    ],
    ids=["empty", "device", "cold", "negative", "endless", "warmup", "no_sample", "order"],
)
def test_names_what_is_wrong(variants, arguments, message):
    with pytest.raises(ValueError, match=rf"^measure: .*{message}.*expected"):
        measure(variants, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("cold_cache", [False, True], ids=["warm", "cold"])
def test_cuda_times_the_device_and_not_the_launch(cold_cache):
    small = torch.zeros(64, device="cuda")
    large = torch.zeros(2048, 2048, device="cuda")
    variants = {"small": lambda: small.add_(1), "large": lambda: large @ large}
    timings = measure(variants, device="cuda", seconds=0.3, cold_cache=cold_cache)
    assert timings["small"].median_ms < 0.05
    assert timings["large"].median_ms > 3 * timings["small"].median_ms
