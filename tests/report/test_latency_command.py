"""``dynabert latency``: protocols, lengths of real texts, subnets by name, and what it refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizer
from typer.testing import CliRunner

import dynabert.latency as latency_module
from dynabert.cli import app
from dynabert.cli._options import parse_fractions, parse_subnets
from dynabert.cli._place import ModelPlace
from dynabert.cli.latency import render_latency
from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow
from dynabert.latency import LatencyRow, LatencySetting, LatencyTable, load_latency
from dynabert.latency_protocols import PROTOCOLS, find_protocol
from dynabert.report import GridReport, build_report
from dynabert.subnet import SubnetConfig

UNEVEN = SubnetConfig(num_heads=(3, 1), intermediate_size=(14, 7), layers=(0, 2))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good"]
SETTING = LatencySetting("an abacus", "cpu", 2, "auto (cpu)", "float32", 4, 128, "toy", {})
ROW = LatencyRow(
    subnet=SubnetConfig(0.5, 2 / 3),
    median_ms=2.0,
    p20_ms=1.5,
    p80_ms=2.5,
    p99_ms=10.0,
    num_samples=50,
    throughput=2000.0,
    measured_at="2026-01-02",
    peak_memory_mib=3.25,
    outliers=0.04,
    tokens_per_second=256000.0,
)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Next to no warm-up, and no picture, which takes longer than all the rest."""
    monkeypatch.setattr(latency_module, "_WARMUP_SECONDS", 0.0)
    monkeypatch.setattr("dynabert.report.plot_pareto", lambda *_: None)
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """A model with its tokeniser and a grid of two subnets, one of them uneven."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizer.from_pretrained(place).save_pretrained(place)
    model.save_pretrained(place)
    rows = [GridRow(subnet, {"accuracy": 0.5}, 0.5, 9) for subnet in (SubnetConfig(), UNEVEN)]
    spec = TaskSpec("file", "classification", ("text",), ("no", "yes"), ("accuracy",), "accuracy")
    build_report(model, rows, spec).save(place / "grid.json")
    return place


def run(*arguments: str | Path) -> tuple[int, str, str]:
    command = ["latency", *map(str, arguments), "--samples", "3", "--threads", "1"]
    result = CliRunner().invoke(app, command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_uneven_subnets_are_timed_and_shown_with_the_grid(folder: Path) -> None:
    code, out, _ = run(folder, "--seq-len", "7")
    assert code == 0
    table = load_latency(folder / "latency.json")
    names = [row.subnet.name for row in table.rows]
    assert names[0] == "w1-d1" and names[-1] == UNEVEN.name == "h3.1-i14.7-l0.2"
    assert [row.num_samples for row in table.rows] == [3] * len(names)
    assert [line.split()[0] for line in out.splitlines()[3:-2]] == names
    report = GridReport.load(folder / "grid.json")
    assert [row.median_ms for row in report.rows] == [
        table.rows[0].median_ms,
        table.rows[-1].median_ms,
    ]


def test_lengths_of_a_file_and_subnets_by_name(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = ["the film", "the film was good", "good " * 30]
    texts.write_text("".join(json.dumps({"note": line}) + "\n" for line in lines))
    code, out, _ = run(
        *(folder, "--lengths-from", texts, "--text-column", "note", "--batch-size", "2"),
        *("--seq-len", "11", "--subnets", f"0.5x2/3,{UNEVEN.name}"),
    )
    assert code == 0
    table = load_latency(folder / "latency.json", lengths="texts.jsonl")
    assert [row.subnet for row in table.rows] == [SubnetConfig(0.5, 2 / 3), UNEVEN]
    # Between [CLS] and [SEP]: 2, 4 and 30 words, the last cut to 11 tokens.
    mean = (4 + 6 + 11) / 3
    assert f"batch 2, at most 11 tokens (texts.jsonl: 3 texts, mean {mean:.1f} tokens" in out


def test_a_protocol_fills_in_what_is_not_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def measure(model: Any, subnets: Any, **how: Any) -> LatencyTable:
        asked.append(how)
        return LatencyTable(SETTING, (replace(ROW, subnet=subnets[0]),))

    monkeypatch.setattr(latency_module, "measure_latency", measure)
    monkeypatch.setattr("dynabert.cli._options.check_seq_len", lambda *_: None)
    command = ["latency", str(folder), "--subnets", "1"]
    for more in (["--protocol", "paper-gpu", "--device", "cpu"], ["--protocol", "paper-cpu"], []):
        assert CliRunner().invoke(app, [*command, *more]).exit_code == 0
    names = ("batch_size", "seq_len", "num_samples", "device")
    assert [tuple(how[name] for name in names) for how in asked] == [
        (128, 128, 100, "cpu"),
        (1, 128, None, "cpu"),
        (1, 128, None, "cpu"),
    ]
    assert PROTOCOLS["paper-gpu"].device == "cuda"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--protocol", "paper"), "name='paper', expected one of paper-gpu, paper-cpu"),
        (("--subnets", "0.5y1"), "--subnets: '0.5y1', expected a list of subnets"),
        (("--subnets", "1", "--widths", "1"), "given beside --widths or --depths"),
        (("--widths", "0.5x0.5"), "--widths: '0.5x0.5', expected numbers"),
        (("--seq-len", "7", "--capture"), "expected a CUDA device"),
        (("--seq-len", "7", "--lengths-from", "none.csv"), "expected an existing file"),
    ],
    ids=["protocol", "subnet", "both", "widths", "capture", "no-file"],
)
def test_bad_requests_are_one_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not (folder / "latency.json").exists()


def test_a_file_that_cannot_take_a_table_is_refused_before_measuring(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "latency.json").write_text('{"schema": 1, "tables": []}')
    monkeypatch.setattr(latency_module, "measure_latency", None)
    code, _, err = run(folder, "--seq-len", "7")
    assert code == 2 and "schema=1, expected 2" in err


def test_the_grid_shows_what_was_timed_before_too(folder: Path) -> None:
    place = ModelPlace.find(folder)
    for subnet, ms in ((SubnetConfig(), 8.0), (UNEVEN, 3.0)):
        report = place.add_latency(
            LatencyTable(SETTING, (replace(ROW, subnet=subnet, median_ms=ms),))
        )
        assert report == GridReport.load(folder / "grid.json")
    assert [row.median_ms for row in GridReport.load(folder / "grid.json").rows] == [8.0, 3.0]
    assert "batch 4 x 128 tokens" in (folder / "grid.md").read_text()
    assert not list(folder.glob(".*"))


def test_text_has_every_number_under_its_heading() -> None:
    unknown = replace(
        ROW, subnet=SubnetConfig(), peak_memory_mib=None, tokens_per_second=None, outliers=0.5
    )
    lines = render_latency(LatencyTable(SETTING, (unknown, ROW))).splitlines()
    assert lines[0] == SETTING.describe()
    assert lines[2].split() == [
        *("width", "depth", "median", "p20", "p80", "p99"),
        *("sequences/s", "tokens/s", "memory", "outliers"),
    ]
    assert [line.split() for line in lines[3:5]] == [
        ["1", "1", "2.00", "1.50", "2.50", "10.00", "2000.0", "-", "-", "50%"],
        ["0.5", "2/3", "2.00", "1.50", "2.50", "10.00", "2000.0", "256000", "3.2", "4%"],
    ]
    assert len({len(line) for line in lines[2:5]}) == 1


def test_lists_of_subnets_and_of_fractions() -> None:
    assert parse_subnets(f"1, 0.5x2/3,{UNEVEN.name}") == [
        SubnetConfig(),
        SubnetConfig(0.5, 2 / 3),
        UNEVEN,
    ]
    assert parse_fractions("--widths", "1,2/3") == (1.0, 2 / 3)
    with pytest.raises(ValueError, match="expected numbers"):
        parse_fractions("--widths", UNEVEN.name)


def test_protocols_are_found_by_name() -> None:
    gpu, cpu = find_protocol("paper-gpu"), find_protocol("paper-cpu")
    assert (gpu.batch_size, gpu.seq_len, gpu.num_samples) == (128, 128, 100)
    assert (cpu.device, cpu.batch_size, cpu.seq_len) == ("cpu", 1, 128)
