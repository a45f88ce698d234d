"""Measuring, mostly on a clock that the test winds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynabert.latency as latency_module
from dynabert import DynaBertConfig
from dynabert.latency import Lengths, measure_latency
from dynabert.subnet import SubnetConfig, SubnetShape, subnet_grid
from dynabert_kernels import use_backend
from dynabert_kernels.ops import forced_backend

GRID = subnet_grid(widths=(1.0, 0.5), depths=(1.0, 2 / 3))
QUICK: dict[str, Any] = {"seq_len": 7, "seconds_per_subnet": 0.01, "progress": False}


class Clock(nn.Module):
    """A model and the clock beside it; a call winds the clock by what the call is said to cost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = DynaBertConfig()
        self.calls: list[SubnetConfig] = []
        self.masks: list[Tensor | None] = []
        self.costs_ms: dict[str, Iterator[float]] = {}
        self.quantization: str | None = None

    def perf_counter(self) -> float:
        return self.now

    def subnet_shape(self, subnet: SubnetConfig) -> SubnetShape:
        return SubnetShape((), ())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, subnet: SubnetConfig
    ) -> None:
        self.calls.append(subnet)
        self.masks.append(attention_mask)
        if attention_mask is None:
            self.now += next(self.costs_ms[subnet.name]) / 1e3
        else:
            self.now += int(attention_mask.sum()) / 1e3  # a millisecond for each token


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency_module, "time", made)
    return made


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to no warm-up and few samples, where the numbers do not matter."""
    monkeypatch.setattr(latency_module, "_WARMUP_SECONDS", 0.0)
    monkeypatch.setattr(latency_module, "_SLICES", 1)


def test_rows_report_the_samples_of_each_subnet(clock: Clock) -> None:
    # Every cost from 2 to 100 ms equally often; the first call is the warm-up.
    for i, subnet in enumerate(GRID):
        samples = itertools.cycle([2.0 * n + i for n in range(1, 51)])
        clock.costs_ms[subnet.name] = itertools.chain([1000.0], samples)
    got = measure_latency(
        clock, GRID, seq_len=7, batch_size=3, seconds_per_subnet=40.0, progress=False
    )
    for i, row in enumerate(got.rows):
        assert row.num_samples == pytest.approx(40_000 / 52.5, rel=0.05)
        assert row.median_ms == pytest.approx(51 + i, abs=2)
        assert row.p20_ms == pytest.approx(21 + i, abs=2)
        assert row.p80_ms == pytest.approx(81 + i, abs=2)
        assert row.p99_ms == pytest.approx(99 + i, abs=2)
        assert row.throughput == pytest.approx(3e3 / row.median_ms)
        by_name = [row.at(name) for name in ("median", "p20", "p80", "p99")]
        assert by_name == [row.median_ms, row.p20_ms, row.p80_ms, row.p99_ms]


def test_subnets_take_turns_and_the_turns_change(clock: Clock) -> None:
    clock.costs_ms = {subnet.name: itertools.repeat(125.0) for subnet in GRID}
    got = measure_latency(clock, GRID, seq_len=7, seconds_per_subnet=3.75, progress=False)
    assert [row.num_samples for row in got.rows] == [30] * len(GRID)
    # Two calls of each warm up, one before every slice is not timed; memory comes last.
    rounds = list(zip(*[iter(clock.calls)] * len(GRID), strict=True))[2 : 2 + 30 + 10]
    assert len(rounds) == 40
    assert all(set(turn) == set(GRID) for turn in rounds)
    assert len(set(rounds)) > 5


def test_slow_subnets_still_get_their_samples(clock: Clock) -> None:
    clock.costs_ms = {subnet.name: itertools.repeat(1000.0) for subnet in GRID}
    got = measure_latency(clock, GRID, seq_len=7, seconds_per_subnet=0.1, progress=False)
    assert [row.num_samples for row in got.rows] == [20] * len(GRID)


def test_a_number_of_samples_holds_whatever_the_time(clock: Clock) -> None:
    clock.costs_ms = {subnet.name: itertools.repeat(500.0) for subnet in GRID}
    got = measure_latency(clock, GRID, seq_len=7, num_samples=23, progress=False)
    assert [row.num_samples for row in got.rows] == [23] * len(GRID)


def test_an_outlier_is_counted_and_named(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    steady = {subnet.name: itertools.repeat(10.0) for subnet in GRID[1:]}
    clock.costs_ms = {GRID[0].name: itertools.cycle([10.0, 10.0, 400.0]), **steady}
    with caplog.at_level(logging.WARNING):
        got = measure_latency(clock, GRID, seq_len=7, seconds_per_subnet=9.0, progress=False)
    assert got.rows[0].p99_ms == pytest.approx(400.0)
    assert got.rows[0].median_ms == pytest.approx(10.0)
    assert got.rows[0].outliers == pytest.approx(1 / 3, abs=0.05)
    assert [row.outliers for row in got.rows[1:]] == [0.0] * (len(GRID) - 1)
    assert "w1-d1 took 10 to 400 ms" in caplog.text


@pytest.mark.parametrize(
    ("spike_ms", "share", "warns"),
    [(11.9, 0.0, False), (12.2, 0.1, True), (40.0, 0.1, True)],
    ids=["within-a-fifth", "beyond-a-fifth", "far-out"],
)
def test_rare_outliers_are_a_share(
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    spike_ms: float,
    share: float,
    warns: bool,
) -> None:
    clock.costs_ms = {"w1-d1": itertools.cycle([*[10.0] * 9, spike_ms])}
    with caplog.at_level(logging.WARNING):
        got = measure_latency(clock, GRID[:1], seq_len=7, num_samples=500, progress=False)
    assert got.rows[0].outliers == pytest.approx(share, abs=0.02)
    assert ("w1-d1 took far longer than usual in" in caplog.text) is warns


def test_jitter_is_no_outlier(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    # A triangle of times from 10 to 14 ms: five deviations reach beyond its end.
    clock.costs_ms = {"w1-d1": itertools.cycle([10.0, 11.0, 12.0, 13.0, 14.0, 13.0, 12.0, 11.0])}
    with caplog.at_level(logging.WARNING):
        got = measure_latency(clock, GRID[:1], seq_len=7, num_samples=200, progress=False)
    assert got.rows[0].outliers == 0.0
    assert caplog.text == ""


def test_lengths_that_vary_are_no_outliers_and_alike_for_all(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = Lengths((1, 2, 9, 30), "notes")
    with caplog.at_level(logging.WARNING):
        got = measure_latency(
            clock, GRID, batch_size=2, seq_len=7, num_samples=150, lengths=lengths, progress=False
        )
    assert got.setting.lengths == lengths.capped(7).describe()
    assert got.setting.lengths.startswith("notes: 4 texts, mean 4.2 tokens, ")
    sizes = [int(mask.sum()) for mask in clock.masks if mask is not None]
    assert max(sizes) == 14
    for row in got.rows:
        assert row.outliers == 0.0
        assert row.tokens_per_second == pytest.approx(1000.0)
        assert row.throughput == pytest.approx(1000.0 / 4.25, rel=0.05)
        assert (row.p99_ms, row.num_samples) == (pytest.approx(14.0), 150)
    assert caplog.text == ""
    by_subnet = {
        subnet: [size for call, size in zip(clock.calls, sizes, strict=True) if call == subnet]
        for subnet in GRID
    }
    assert len({tuple(each[-160:]) for each in by_subnet.values()}) == 1


def test_a_captured_model_is_what_is_timed(clock: Clock) -> None:
    replays: list[SubnetConfig] = []
    sizes: list[tuple[int, int]] = []

    def capture(batch_size: int, seq_len: int) -> Callable[..., None]:
        sizes.append((batch_size, seq_len))

        def replay(input_ids: Tensor, attention_mask: Tensor | None, subnet: SubnetConfig) -> None:
            assert attention_mask is not None and attention_mask.shape == input_ids.shape
            replays.append(subnet)
            clock.now += 4e-3

        return replay

    clock.capture = capture
    got = measure_latency(
        clock,
        GRID,
        batch_size=3,
        seq_len=9,
        num_samples=20,
        lengths=Lengths((4, 5)),
        capture=True,
        progress=False,
    )
    assert got.setting.captured and "in CUDA graphs" in got.setting.describe()
    assert sizes == [(3, 5)]
    assert set(replays) == set(GRID) and not clock.calls
    assert [row.median_ms for row in got.rows] == pytest.approx([4.0] * len(GRID))
    assert {row.peak_memory_mib for row in got.rows} == {None}


@pytest.mark.usefixtures("quickly")
def test_setting_says_what_the_numbers_hold_for(model: Any) -> None:
    setting = measure_latency(model, GRID[:1], **QUICK).setting
    assert (setting.batch_size, setting.seq_len, setting.dtype, setting.device) == (
        1,
        7,
        "float32",
        "cpu",
    )
    assert setting.threads == torch.get_num_threads()
    assert setting.backend.startswith("auto (")
    assert setting.versions["torch"] == torch.__version__
    assert setting.why_not_here() is None
    assert "4 heads" in setting.model and "28 neurons" in setting.model


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("fails", [False, True], ids=["measured", "failed"])
def test_threads_backend_and_mode_come_back(model: Any, fails: bool) -> None:
    model.train()
    before = torch.get_num_threads()
    seen = set()

    def spy(*_: Any) -> None:
        seen.add((torch.get_num_threads(), forced_backend(), model.training))
        if fails:
            raise RuntimeError("stop")

    model.register_forward_pre_hook(spy)
    try:
        got = measure_latency(model, GRID, threads=1, backend="reference", **QUICK)
        assert (got.setting.threads, got.setting.backend) == (1, "reference")
    except RuntimeError:
        assert fails
    assert seen == {(1, "reference", False)}
    assert (torch.get_num_threads(), forced_backend(), model.training) == (before, None, True)


@pytest.mark.usefixtures("quickly")
def test_another_dtype_is_timed_on_a_copy(model: Any) -> None:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    got = measure_latency(model, GRID[:1], dtype=torch.bfloat16, threads=1, **QUICK)
    assert got.setting.dtype == "bfloat16"
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())


@pytest.mark.usefixtures("quickly")
def test_a_backend_in_force_is_named(model: Any) -> None:
    with use_backend("reference"):
        assert measure_latency(model, GRID[:1], threads=1, **QUICK).setting.backend == "reference"


@pytest.mark.parametrize(
    ("subnets", "changes", "message"),
    [
        ([], {}, "expected at least one"),
        ([SubnetConfig(), SubnetConfig()], {}, "each once"),
        (GRID, {"batch_size": 0}, "batch_size=0"),
        (GRID, {"seq_len": 0}, "seq_len=0"),
        (GRID, {"threads": 0}, "threads=0"),
        (GRID, {"seconds_per_subnet": 0.0}, "seconds_per_subnet=0.0"),
        (GRID, {"seconds_per_subnet": float("nan")}, "seconds_per_subnet=nan"),
        (GRID, {"backend": "abacus"}, "abacus"),
        ([SubnetConfig(0.3)], {}, "0.3"),
        (GRID, {"seq_len": 34}, "34"),
        (GRID, {"num_samples": 0}, "num_samples=0"),
        (GRID, {"device": "meta"}, "device=meta, expected cpu or cuda"),
        (GRID, {"capture": True}, r"device=cpu, expected a CUDA device"),
    ],
    ids=[
        "no-subnets",
        "subnet-twice",
        "no-batch",
        "no-tokens",
        "no-threads",
        "no-time",
        "nan-time",
        "no-such-backend",
        "not-whole-heads",
        "too-long",
        "no-samples",
        "no-such-device",
        "capture-on-cpu",
    ],
)
def test_bad_requests_are_refused(
    model: Any, subnets: list[SubnetConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(model, subnets, **{**QUICK, **changes})
    assert forced_backend() is None


@pytest.mark.usefixtures("quickly")
def test_memory_of_a_call_is_what_it_has_beyond_the_model(model: Any) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("/proc/self/clear_refs is not there: no mark to reset")

    def need_memory(*_: Any) -> None:
        torch.ones(24 * 2**20, dtype=torch.uint8)

    model.register_forward_pre_hook(need_memory)
    got = measure_latency(model, GRID[:2], threads=1, **QUICK)
    assert [row.peak_memory_mib for row in got.rows] == pytest.approx([24.0] * 2, abs=1.5)


@pytest.mark.gpu
def test_gpu_calls_are_timed_to_their_end(model: Any) -> None:
    got = measure_latency(model, GRID, device="cuda", dtype=torch.bfloat16, **QUICK)
    assert got.setting.device == "cuda"
    assert torch.cuda.get_device_name() in got.setting.hardware
    assert all(row.median_ms > 0 for row in got.rows)
    assert all(row.peak_memory_mib is not None and row.peak_memory_mib > 0 for row in got.rows)


@pytest.mark.gpu
def test_gpu_calls_are_timed_as_replays(model: Any) -> None:
    got = measure_latency(
        model, GRID, device="cuda", dtype=torch.bfloat16, backend="triton", capture=True, **QUICK
    )
    assert got.setting.captured
    assert all(row.median_ms > 0 for row in got.rows)
