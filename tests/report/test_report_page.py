"""The HTML page: its numbers, and its safety against what users name things."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dynabert import DynaBertForSequenceClassification
from dynabert.cli import app
from dynabert.latency import save_latency
from dynabert.picking import MARGIN
from dynabert.report_page import PeakFile, Sources, build_document, peaks, render_page
from dynabert.report_page.peaks import KernelRow, KernelTable, Peak, measure_kernels, measure_peak
from dynabert_kernels.timing import Timing
from tests.report.report_toys import (
    EVIL,
    MEDIANS,
    SCORES,
    SUBNETS,
    WHEN,
    setting_of,
    timed,
    toy_sources,
)


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture
def sources(model: DynaBertForSequenceClassification) -> Sources:
    return toy_sources(model)


class Reader(HTMLParser):
    """Elements of a page with their attributes, and the text of scripts, style and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def text_of(self, tag: str) -> list[str]:
        return [text for of, text in self.texts if of == tag and text.strip()]


def embedded(page: str) -> Any:
    return json.loads(Reader(page).text_of("script")[0])


def test_document_holds_the_numbers_of_grid_and_tables(sources: Sources) -> None:
    document = build_document(sources)
    assert [subnet["score"] for subnet in document["subnets"]] == list(SCORES)
    assert [subnet["label"] for subnet in document["subnets"]][3:] == [
        *("(0.5, 2/3)", "(1, 1/3)", "(0.5, 1/3)", "S1"),
    ]
    assert document["subnets"][6]["call"] == (
        "SubnetConfig(num_heads=(4, 1), intermediate_size=(7, 28), layers=(0, 2))"
    )
    first = document["tables"][0]
    assert [(row["subnet"], row["median"]) for row in first["rows"]] == [*enumerate(MEDIANS)]
    assert first["facets"]["length"] == "16 tokens"
    assert document["metric"]["mean"] == pytest.approx(sum(SCORES[:6]) / 6)
    assert document["margin"] == MARGIN


def test_calls_are_those_of_the_subnets(sources: Sources) -> None:
    """What the page tells users to type gives the subnet back."""
    for subnet, shown in zip(SUBNETS, build_document(sources)["subnets"], strict=True):
        scope: dict[str, Any] = {}
        exec(f"from dynabert import SubnetConfig; made = {shown['call']}", scope)
        assert scope["made"].name == subnet.name


def test_rates_are_operations_over_time(sources: Sources) -> None:
    """Counted by hand for 3 x 16 tokens; hidden size 20, head size 5."""
    first, _, in_int8, _ = build_document(sources)["tables"]
    tokens = 3 * 16
    attention = tokens * (2 * 4 * 20 * 4 * 5 + 4 * 16 * 4 * 5)
    ffn = tokens * 2 * 2 * 20 * 28
    rate = 3 * (attention + ffn) / 12e-3
    assert first["rows"][0]["rate"] == pytest.approx(rate)
    assert first["rows"][0]["share"] == pytest.approx(rate / 1e9)
    assert first["kernels"] == [
        {"op": "ffn", "size": 28, "median": 0.5, "rate": pytest.approx(2e7), "share": 0.02}
    ]
    assert (in_int8["peak"], in_int8["rows"][0]["share"], in_int8["kernels"]) == (None, None, [])


def test_ragged_tables_have_no_rates(sources: Sources, model: Any) -> None:
    ragged = timed(setting_of(model, lengths="toy: 9 texts"))
    table = build_document(replace(sources, tables=[ragged]))["tables"][0]
    assert {row["rate"] for row in table["rows"]} == {None}
    assert table["facets"]["length"] == "toy: 9 texts"


def test_foreign_tables_are_marked_and_other_models_left_out(sources: Sources) -> None:
    document = build_document(sources)
    assert [table["foreign"] is None for table in document["tables"]] == [True, True, True, False]
    assert "an abacus" in document["tables"][3]["foreign"]
    assert len(document["left_out"]) == 1
    assert "another: 2 layers" in document["left_out"][0]


def test_page_embeds_the_document_unchanged(sources: Sources) -> None:
    document = build_document(sources)
    assert embedded(render_page(document)) == json.loads(json.dumps(document))


def test_names_of_users_stay_text(sources: Sources, model: Any) -> None:
    assert sources.grid is not None
    hostile = replace(
        sources,
        name=EVIL,
        grid=replace(sources.grid, task=EVIL),
        tables=[timed(setting_of(model, hardware=EVIL))],
    )
    document = build_document(hostile)
    page = render_page(document, EVIL)
    reader, harmless = Reader(page), Reader(render_page(build_document(sources)))
    assert [tag for tag, _ in reader.elements] == [tag for tag, _ in harmless.elements]
    assert embedded(page)["task"] == EVIL
    assert "".join(reader.text_of("title")) == f"{EVIL}: elastic report"
    assert "".join(reader.text_of("pre")) == EVIL


def test_page_runs_its_own_script_and_asks_for_nothing(sources: Sources) -> None:
    page = render_page(build_document(sources))
    reader = Reader(page)
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in reader.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    for kind, text in (
        ("style", reader.text_of("style")[0]),
        ("script", reader.text_of("script")[1]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    names = {name for _, attributes in reader.elements for name in attributes}
    assert not names & {"src", "href", "style"}
    assert not [name for name in names if name.startswith("on")]
    assert re.findall(r"https?://[\w./]+", page) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in page
    assert "url(" not in page


def test_a_number_that_json_lacks_is_refused(sources: Sources) -> None:
    document = build_document(sources)
    document["metric"]["mean"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        render_page(document)


@pytest.mark.parametrize("missing", ["tables", "grid", "both"])
def test_document_without_grid_or_tables(sources: Sources, missing: str) -> None:
    changes = {"tables": {"tables": []}, "grid": {"grid": None}}
    changes["both"] = {**changes["tables"], **changes["grid"]}
    document = build_document(replace(sources, **changes[missing]))
    assert (document["metric"] is None) == (missing != "tables")
    assert (document["tables"] == []) == (missing != "grid")
    assert len(document["subnets"]) == (0 if missing == "both" else 7)
    assert embedded(render_page(document)) == json.loads(json.dumps(document))


def test_peak_file_keeps_what_is_not_measured_again(model: Any, tmp_path: Path) -> None:
    setting = setting_of(model)
    old = Peak(setting.hardware, "cpu", 2, "float32", 1.0, "slow", WHEN)
    other = replace(old, dtype="int8")
    kernels = KernelTable(setting, (KernelRow("attention", 4, 1.0, 100),))
    PeakFile((old, other), (kernels,)).save(tmp_path / "peak.json")
    newer = PeakFile((replace(old, flops_per_second=2.0),))
    merged = PeakFile.load(tmp_path / "peak.json").merged(newer)
    assert [peak.flops_per_second for peak in merged.peaks] == [2.0, 1.0]
    assert merged.kernel_rows(setting) == kernels.rows
    assert merged.peak(setting) == newer.peaks[0]
    assert merged.peak(replace(setting, threads=1)) is None
    assert PeakFile.load(tmp_path / "none.json") == PeakFile()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "peak.json").write_text('{"schema": 1, "peaks": [{"speed": 1}], "kernels": []}')
    with pytest.raises(ValueError, match="measure again"):
        PeakFile.load(tmp_path / "peak.json")


class FakeExtension:
    def measure_peak(self, kind: str, threads: int, seconds: float) -> float:
        assert (kind, threads, seconds) == ("bf16", 2, 0.5)
        return 7e9


def test_cpu_peak_is_that_of_the_extension(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "cpu_extension", FakeExtension)
    peak = measure_peak(setting_of(model, dtype="bfloat16"), seconds=0.5)
    assert (peak.flops_per_second, peak.threads, peak.dtype) == (7e9, 2, "bfloat16")


def test_without_extension_products_give_the_peak(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise ImportError("not built")

    def fake_measure(variants: dict[str, Any], **_: Any) -> dict[str, Timing]:
        left, right = variants["product"].args
        assert left.shape == right.shape == (64, 64)
        return {"product": Timing((4.0, 2.0, 8.0))}

    monkeypatch.setattr(peaks, "cpu_extension", absent)
    monkeypatch.setattr(peaks, "measure", fake_measure)
    monkeypatch.setitem(peaks._PRODUCT_SIZE, "cpu", 64)
    assert measure_peak(setting_of(model)).flops_per_second == 2 * 64**3 / 2e-3
    with pytest.raises(NotImplementedError, match="int8 on cpu"):
        measure_peak(setting_of(model, dtype="int8"))


def test_kernels_are_timed_at_every_width_of_the_grid(model: Any) -> None:
    threads = torch.get_num_threads()
    table = measure_kernels(model, timed(setting_of(model, threads=1)), seconds=0.01)
    assert [(row.op, row.size) for row in table.rows] == [
        *(("attention", 2), ("attention", 4), ("ffn", 14), ("ffn", 28)),
    ]
    tokens = 3 * 16
    assert [row.flops for row in table.rows] == [
        *(tokens * (2 * 4 * 20 * heads * 5 + 4 * 16 * heads * 5) for heads in (2, 4)),
        *(tokens * 2 * 2 * 20 * neurons for neurons in (14, 28)),
    ]
    assert torch.get_num_threads() == threads


@pytest.fixture
def place(sources: Sources, tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    sources.model.save_pretrained(folder)
    assert sources.grid is not None
    sources.grid.save(folder / "grid.json")
    for table in sources.tables:
        save_latency(table, folder / "latency.json")
    return folder


def test_verb_writes_the_page_and_its_document(place: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(place), "--json", str(place / "page.json")])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == f"{place / 'report.html'}: 7 subnets, 4 latency tables"
    document = json.loads((place / "page.json").read_text())
    assert embedded((place / "report.html").read_text()) == document
    assert document["name"] == "toy"
    former = (place / "report.html").read_bytes()
    (place / "latency.json").write_text("{}")
    assert CliRunner().invoke(app, ["report", str(place)]).exit_code == 2
    assert (place / "report.html").read_bytes() == former
    assert CliRunner().invoke(app, ["report", str(place), "--out", str(place)]).exit_code == 2


def test_settings_of_a_table_are_all_in_the_document(sources: Sources) -> None:
    table = build_document(sources)["tables"][0]
    assert table["setting"] == asdict(sources.tables[0].setting)
