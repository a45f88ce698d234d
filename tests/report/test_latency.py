"""Measuring on a clock the test winds, and the file that keeps what was measured."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig

import dynabert.latency as latency_module
import dynabert.latency_table as table_module
from dynabert.latency import (
    LatencyRow,
    LatencySetting,
    LatencyTable,
    load_latency,
    measure_latency,
    save_latency,
)
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
        self.config = BertConfig()
        self.calls: list[SubnetConfig] = []
        self.costs_ms: dict[str, Iterator[float]] = {}
        self.quantization: str | None = None

    def perf_counter(self) -> float:
        return self.now

    def subnet_shape(self, subnet: SubnetConfig) -> SubnetShape:
        return SubnetShape((), ())

    def forward(self, input_ids: Tensor, subnet: SubnetConfig) -> None:
        self.calls.append(subnet)
        self.now += next(self.costs_ms[subnet.name]) / 1e3


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


@pytest.fixture
def table(model: Any) -> LatencyTable:
    """A table as if measured here and now."""
    setting = LatencySetting(
        hardware=table_module.hardware_name("cpu"),
        device="cpu",
        threads=2,
        backend="auto (reference)",
        dtype="float32",
        batch_size=1,
        seq_len=7,
        model=table_module.describe_model(model),
        versions=table_module.package_versions(),
    )
    rows = [
        LatencyRow(subnet, ms, ms - 1, ms + 2, ms + 5, 100, 1e3 / ms, "2026-01-02T03:04:05+00:00")
        for ms, subnet in zip((8.0, 5.0, 6.0, 4.0), GRID, strict=True)
    ]
    return LatencyTable(setting, tuple(rows))


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
    rounds = list(zip(*[iter(clock.calls)] * len(GRID), strict=True))[2:]  # after the warm-up
    assert len(rounds) == 30 + 9  # and a call of each before every slice but the first
    assert all(set(turn) == set(GRID) for turn in rounds)
    assert len(set(rounds)) > 5


def test_slow_subnets_still_get_their_samples(clock: Clock) -> None:
    clock.costs_ms = {subnet.name: itertools.repeat(1000.0) for subnet in GRID}
    got = measure_latency(clock, GRID, seq_len=7, seconds_per_subnet=0.1, progress=False)
    assert [row.num_samples for row in got.rows] == [20] * len(GRID)


def test_an_outlier_is_counted_and_named(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    steady = {subnet.name: itertools.repeat(10.0) for subnet in GRID[1:]}
    clock.costs_ms = {GRID[0].name: itertools.cycle([10.0, 10.0, 400.0]), **steady}
    with caplog.at_level(logging.WARNING):
        got = measure_latency(clock, GRID, seq_len=7, seconds_per_subnet=9.0, progress=False)
    assert got.rows[0].p99_ms == pytest.approx(400.0)
    assert got.rows[0].median_ms == pytest.approx(10.0)
    assert "w1-d1 took 10 to 400 ms" in caplog.text


@pytest.mark.usefixtures("quickly")
def test_setting_says_what_the_numbers_hold_for(model: Any) -> None:
    setting = measure_latency(model, GRID, **QUICK).setting
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
    got = measure_latency(model, GRID[:1], dtype=torch.bfloat16, **QUICK)
    assert got.setting.dtype == "bfloat16"
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())


@pytest.mark.usefixtures("quickly")
def test_a_backend_in_force_is_named(model: Any) -> None:
    with use_backend("reference"):
        assert measure_latency(model, GRID[:1], **QUICK).setting.backend == "reference"


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
    ],
)
def test_bad_requests_are_refused(
    model: Any, subnets: list[SubnetConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure_latency(model, subnets, **{**QUICK, **changes})
    assert forced_backend() is None


def test_file_gives_back_what_was_saved(model: Any, table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    save_latency(table, path)
    assert load_latency(path, batch_size=1, backend="auto", model=model) == table
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


def test_saving_again_replaces_rows_and_keeps_the_rest(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    extra = replace(table.rows[0], subnet=SubnetConfig(0.25), median_ms=3.0)
    newer = replace(table, rows=(replace(table.rows[1], median_ms=123.0), extra))
    other = replace(table, setting=replace(table.setting, batch_size=32))
    for each in (table, other, newer):
        save_latency(each, path)
    merged = load_latency(path, batch_size=1)
    assert [row.subnet.name for row in merged.rows] == [
        *(subnet.name for subnet in GRID),
        "w0.25-d1",
    ]
    assert [merged.rows[1].median_ms, merged.rows[0]] == [123.0, table.rows[0]]
    assert load_latency(path, batch_size=32) == other


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hardware", "Abacus Mark II (1 cores)", "measured on Abacus Mark II"),
        ("versions", {"torch": "0.4"}, "torch 0.4, now"),
    ],
    ids=["other-machine", "other-versions"],
)
def test_foreign_tables_are_refused_with_the_reason(
    table: LatencyTable, tmp_path: Path, field: str, value: Any, reason: str
) -> None:
    path = tmp_path / "latency.json"
    foreign = replace(table, setting=replace(table.setting, **{field: value}))
    save_latency(foreign, path)
    with pytest.raises(ValueError, match=reason):
        load_latency(path)
    assert load_latency(path, allow_foreign=True) == foreign
    save_latency(table, path)
    assert load_latency(path, allow_foreign=True) == table


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda.is_available() is True")
def test_a_table_of_a_gpu_is_foreign_where_there_is_none(
    table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "latency.json"
    hardware = "NVIDIA H200 beside Abacus Mark II (1 cores)"
    setting = replace(table.setting, device="cuda", hardware=hardware)
    save_latency(replace(table, setting=setting), path)
    with pytest.raises(ValueError, match=r"NVIDIA H200 .* this machine has no GPU"):
        load_latency(path)


def test_an_ambiguous_choice_lists_the_settings(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    save_latency(table, path)
    save_latency(replace(table, setting=replace(table.setting, batch_size=32)), path)
    with pytest.raises(ValueError, match=r"2 tables(.|\n)*batch 1 x 7(.|\n)*batch 32 x 7"):
        load_latency(path)
    with pytest.raises(ValueError, match="no table with batch_size=5"):
        load_latency(path, batch_size=5)


def test_tables_of_another_model_do_not_count(
    model: Any, table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "latency.json"
    save_latency(replace(table, setting=replace(table.setting, model="another")), path)
    with pytest.raises(ValueError, match="no table with model="):
        load_latency(path, model=model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 99, "tables": []}', '{"schema": 1}', '{"schema":1,"tables":[{}]}'],
    ids=["empty", "cut", "list", "schema", "no-tables", "no-fields"],
)
def test_a_damaged_file_is_named_and_left_alone(
    table: LatencyTable, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "latency.json"
    path.write_text(text)
    for action in (load_latency, lambda p: save_latency(table, p)):
        with pytest.raises(ValueError, match=r"latency\.json"):
            action(path)
    assert path.read_text() == text


def test_a_table_json_cannot_express_leaves_the_file_as_it_was(
    table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "latency.json"
    save_latency(table, path)
    before = path.read_text()
    broken = replace(table, rows=(replace(table.rows[0], median_ms=float("nan")),))
    with pytest.raises(ValueError, match="JSON"):
        save_latency(broken, path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


def test_row_is_found_by_a_rounded_fraction(table: LatencyTable) -> None:
    found = table.row(SubnetConfig(0.5, 0.6667))
    assert found is not None and found.subnet == SubnetConfig(0.5, 2 / 3)
    assert table.row(SubnetConfig(0.25)) is None


def test_hardware_is_named_without_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(table_module.Path, "read_text", missing)
    assert table_module.hardware_name("cpu").split(" (")[0]


def test_file_is_plain_json(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    save_latency(table, path)
    document = json.loads(path.read_text())
    assert document["tables"][0]["rows"][0]["subnet"]["width_mult"] == 1.0


@pytest.mark.gpu
def test_gpu_calls_are_timed_to_their_end(model: Any) -> None:
    got = measure_latency(model, GRID, device="cuda", dtype=torch.bfloat16, **QUICK)
    assert got.setting.device == "cuda"
    assert torch.cuda.get_device_name() in got.setting.hardware
    assert all(row.median_ms > 0 for row in got.rows)
