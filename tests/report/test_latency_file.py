"""The file that gathers latency tables: what it keeps, what it refuses, who may write it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dynabert.latency_file as file_module
import dynabert.latency_table as table_module
from dynabert.latency import (
    LatencyRow,
    LatencySetting,
    LatencyTable,
    load_latency,
    save_latency,
)
from dynabert.latency_file import locked
from dynabert.subnet import SubnetConfig, subnet_grid
from dynabert_kernels._extension import cpu_extension, extension_error

GRID = subnet_grid(widths=(1.0, 0.5), depths=(1.0, 2 / 3))


@pytest.fixture
def table(model: Any) -> LatencyTable:
    """A table as if measured here and now."""
    setting = LatencySetting(
        hardware=table_module.hardware_name("cpu"),
        device="cpu",
        threads=2,
        backend=table_module.automatic_backend(torch.device("cpu")),
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


def test_lengths_and_graphs_are_other_settings(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    ragged, captured = (
        replace(table, setting=replace(table.setting, **changes))
        for changes in ({"lengths": "dev.tsv: 9 texts, mean 4.0 tokens, ab"}, {"captured": True})
    )
    for each in (ragged, captured, table):
        save_latency(each, path)
    assert load_latency(path) == table
    assert load_latency(path, lengths="dev.tsv") == ragged
    assert load_latency(path, lengths=ragged.setting.lengths) == ragged
    assert load_latency(path, captured=True) == captured
    with pytest.raises(ValueError, match="3 tables with any setting, expected one"):
        load_latency(path, lengths=None, captured=None)
    with pytest.raises(ValueError, match=r"no table with lengths=dev\."):
        load_latency(path, lengths="dev.")


def test_a_table_of_the_former_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text('{"schema": 1, "tables": []}')
    with pytest.raises(ValueError, match="schema=1, expected 2"):
        load_latency(path)


def test_tables_saved_at_once_are_all_kept(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    tables = [replace(table, setting=replace(table.setting, batch_size=n)) for n in range(1, 13)]
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda each: save_latency(each, path), tables))
    assert kept == tables
    assert [load_latency(path, batch_size=n) for n in range(1, 13)] == tables
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


def test_nobody_else_may_write_meanwhile(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (
        locked(tmp_path),
        (tmp_path / file_module._LOCK_NAME).open("r+") as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken(table: LatencyTable, tmp_path: Path) -> None:
    (tmp_path / file_module._LOCK_NAME).touch()  # its name stays, the lock does not
    save_latency(table, tmp_path / "latency.json")
    assert [p.name for p in tmp_path.iterdir()] == ["latency.json"]


@pytest.mark.slow
def test_processes_that_save_at_once_lose_nothing(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    save_latency(table, path)
    code = """
import sys
from dataclasses import replace
from dynabert.latency import load_latency, save_latency
path, first = sys.argv[1], int(sys.argv[2])
table = load_latency(path, batch_size=1)
sys.stdin.readline()
for n in range(first, first + 25):
    save_latency(replace(table, setting=replace(table.setting, batch_size=n)), path)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(first)], stdin=subprocess.PIPE, text=True
        )
        for first in (100, 200)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0]
    sizes = {kept["setting"]["batch_size"] for kept in json.loads(path.read_text())["tables"]}
    assert sizes == {1, *range(100, 125), *range(200, 225)}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("hardware", "Abacus Mark II (1 cores)", "measured on Abacus Mark II"),
        ("versions", {"torch": "0.4"}, "torch 0.4, now"),
        ("backend", "auto (abacus)", r"with backend auto \(abacus\), now auto \("),
    ],
    ids=["other-machine", "other-versions", "other-automatic-backend"],
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


def test_versions_name_the_instruction_set(table: LatencyTable) -> None:
    if extension_error() is not None:
        pytest.skip(f"no extension: {extension_error()}")
    versions = {**table.setting.versions, "instruction set": "abacus"}
    reason = replace(table.setting, versions=versions).why_not_here()
    assert reason == (
        f"it was measured with instruction set abacus, now {cpu_extension().isa_name()}"
    )


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
