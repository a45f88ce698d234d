"""The report of a grid: what it gathers, how it reads, and its picture."""

from __future__ import annotations

import builtins
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.flops import count_parameters, encoder_flops, encoder_parameters
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable
from dynabert.report import (
    GridReport,
    build_report,
    format_fraction,
    plot_pareto,
    render_grid,
)
from dynabert.subnet import SubnetConfig, subnet_grid

SPEC = TaskSpec("toy", "classification", ("text",), ("a", "b"), ("accuracy", "mcc"), "accuracy")
SETTING = LatencySetting("an abacus", "cpu", 2, "auto (reference)", "float32", 1, 128, "toy", {})
GRID = subnet_grid(widths=(1.0, 0.5), depths=(1.0, 2 / 3, 1 / 3))
SCORES = (0.90, 0.89, 0.895, 0.80, 0.70, 0.60)
MEDIANS = (12.0, 8.0, 7.5, 5.0, 4.0, 3.0)


def latencies(subnets: list[SubnetConfig] = GRID) -> LatencyTable:
    rows = [
        LatencyRow(subnet, ms, ms * 0.9, ms * 1.2, ms * 2, 50, 1e3 / ms, "2026-01-01")
        for subnet, ms in zip(subnets, MEDIANS, strict=False)
    ]
    return LatencyTable(SETTING, tuple(rows))


@pytest.fixture
def grid_rows() -> list[GridRow]:
    return [
        GridRow(subnet, {"accuracy": score, "mcc": score / 2}, score, 41)
        for subnet, score in zip(GRID, SCORES, strict=True)
    ]


@pytest.fixture
def report(model: Any, grid_rows: list[GridRow]) -> GridReport:
    return build_report(model, grid_rows, SPEC, seq_len=16, latency=latencies())


def cells(text: str) -> list[list[str]]:
    """Lines of columns, for either style, with their words joined by single spaces."""
    lines = [line.strip().strip("|") for line in text.splitlines()]
    return [[cell.strip() for cell in re.split(r"\s*\|\s*|\s{2,}", line)] for line in lines if line]


def test_records_hold_sizes_work_and_latency(model: Any, report: GridReport) -> None:
    record = report.rows[3]
    shape = model.subnet_shape(SubnetConfig(0.5, 2 / 3))
    assert (record.num_layers, record.num_heads, record.intermediate_size) == (2, (2, 2), (14, 14))
    assert record.flops == encoder_flops(model.config, shape, 16)
    assert record.parameters == count_parameters(model, shape)
    assert (record.median_ms, record.p20_ms, record.p80_ms) == (5.0, 4.5, 6.0)
    assert (record.metrics, record.primary) == ({"accuracy": 0.80, "mcc": 0.40}, 0.80)
    assert report.mean == pytest.approx(sum(SCORES) / 6)


@pytest.mark.parametrize("subnet", GRID, ids=lambda subnet: subnet.name)
def test_parameters_are_those_the_subnet_reads(model: Any, subnet: SubnetConfig) -> None:
    shape = model.subnet_shape(subnet)
    kept = 0
    for layer in shape.layers:
        packed = model.base_model.encoder.layer[layer.index]
        for part in (
            packed.attention.packed().prefix(layer.num_heads),
            packed.ffn.packed().prefix(layer.intermediate_size),
        ):
            kept += sum(
                getattr(part, name).numel()
                for name in vars(part)
                if hasattr(getattr(part, name), "numel")
            )
    outside = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.base_model.encoder.parameters()
    )
    assert count_parameters(model, shape) == outside + kept
    assert encoder_parameters(model.config, shape) == kept


@pytest.mark.parametrize("style", ["markdown", "text"])
def test_tables_name_their_axes_and_hold_every_cell(report: GridReport, style: Any) -> None:
    text = render_grid(report, style)
    table = cells(text)
    header = ["width (fraction of heads and neurons)", "depth 1", "depth 2/3", "depth 1/3"]
    assert "depth (fraction of layers)" in " ".join(text.split())
    score, latency = (i for i, line in enumerate(table) if line == header)
    skip = 2 if style == "markdown" else 1
    assert table[score + skip : score + skip + 2] == [
        ["1", "90.0", "89.5", "70.0"],
        ["0.5", "89.0", "80.0", "60.0"],
    ]
    assert table[latency + skip : latency + skip + 2] == [
        ["1", "12.00", "7.50", "4.00"],
        ["0.5", "8.00", "5.00", "3.00"],
    ]
    assert "accuracy (%) on 41 rows, mean 79.8" in text
    assert "batch 1 x 128 tokens, float32, auto (reference) backend, 2 threads" in text


def test_details_mark_the_front_and_the_speed_up(report: GridReport) -> None:
    table = cells(render_grid(report, "markdown"))
    start = next(i for i, line in enumerate(table) if line[:2] == ["width", "depth"])
    columns = dict(zip(table[start], zip(*table[start + 2 :], strict=True), strict=True))
    assert columns["speed-up"] == ("1.00x", "1.50x", "1.60x", "2.40x", "3.00x", "4.00x")
    assert columns["Pareto"] == ("*", "", "*", "*", "*", "*")
    assert columns["mcc (x100)"] == ("45.0", "44.5", "44.8", "40.0", "35.0", "30.0")
    assert columns["heads"] == ("4", "2", "4", "2", "4", "2")
    assert columns["p80 (ms)"][0] == "14.40"


def test_text_lines_align_and_stay_short(report: GridReport) -> None:
    text = render_grid(report, "text")
    for block in text.split("\n\n"):
        if "depth 1" in block and "Rows:" not in block:
            ends = {
                line.rindex(line.split()[1]) + len(line.split()[1])
                for line in block.splitlines()[1:]
            }
            assert len(ends) == 1
        elif "Rows:" in block:
            assert max(map(len, block.splitlines())) <= 100


def test_without_latency_there_is_no_latency_column(model: Any, grid_rows: list[GridRow]) -> None:
    text = render_grid(build_report(model, grid_rows, SPEC))
    assert "latency" not in text.lower()
    assert "speed-up" not in text


def test_subnets_that_were_not_timed_have_a_dash(model: Any, grid_rows: list[GridRow]) -> None:
    report = build_report(model, grid_rows, SPEC, latency=latencies(GRID[:2]))
    assert [row.median_ms for row in report.rows] == [12.0, 8.0, None, None, None, None]
    table = cells(render_grid(report))
    assert ["0.5", "8.00", "-", "-"] in table


def test_uneven_subnets_are_listed_but_have_no_cell(model: Any) -> None:
    uneven = SubnetConfig(num_heads=(1, 4), intermediate_size=(5, 28), layers=(0, 2))
    rows = [GridRow(uneven, {"accuracy": 0.5}, 0.5, 41)]
    text = render_grid(build_report(model, rows, SPEC), "text")
    assert cells(text)[-1][:6] == ["-", "-", "2", "1-4", "5-28", "50.0"]
    assert "depth 1" not in text


def test_metrics_nobody_named_are_shown_as_they_are(model: Any) -> None:
    rows = [GridRow(SubnetConfig(), {"cosine": 0.98765}, 0.98765, 41)]
    text = render_grid(build_report(model, rows, TaskSpec("plain", "none", ("text",))))
    assert "cosine on 41 rows, mean 0.9877" in text


def test_a_new_table_replaces_the_latencies(report: GridReport) -> None:
    newer = replace(latencies(GRID[:1]), setting=replace(SETTING, batch_size=8))
    again = report.with_latency(newer)
    assert [row.median_ms for row in again.rows] == [12.0, None, None, None, None, None]
    assert again.latency_setting is not None and "batch 8" in again.latency_setting
    assert report.rows[1].median_ms == 8.0


def test_file_gives_back_what_was_saved(report: GridReport, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    report.save(path)
    assert GridReport.load(path) == report


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"schema": 1', '"schema": 7'),
        lambda text: text.replace('"flops"', '"flip"'),
        lambda text: text.replace('"rows"', '"lines"'),
        lambda text: text.replace('"width_mult": 0.5', '"width_mult": 5'),
    ],
    ids=["cut", "schema", "unknown-field", "no-rows", "impossible-width"],
)
def test_a_damaged_file_is_refused(report: GridReport, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "grid.json"
    report.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="expected"):
        GridReport.load(path)


def test_bad_requests_are_refused(model: Any, report: GridReport) -> None:
    with pytest.raises(ValueError, match="style='html', expected markdown or text"):
        render_grid(report, "html")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        build_report(model, [], SPEC)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.75, "0.75"), (2 / 3, "2/3"), (1 / 6, "1/6"), (0.05, "0.05"), (5 / 12, "5/12")],
)
def test_fractions_read_as_people_write_them(value: float, text: str) -> None:
    assert format_fraction(value) == text


def test_plot_is_a_picture(report: GridReport, tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    plot_pareto(report, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 600


def test_plot_without_latencies_is_refused(
    model: Any, grid_rows: list[GridRow], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no latencies"):
        plot_pareto(build_report(model, grid_rows, SPEC), tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_plot_without_matplotlib_names_the_extra(
    report: GridReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"dynabert-kernels\[train\]"):
        plot_pareto(report, tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
