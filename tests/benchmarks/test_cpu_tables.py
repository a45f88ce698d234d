"""Tables of CPU rows: ratios within one group, the newest group, peers without a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu_tables import groups_of, latency_table, plot, report

PLACE = "bert-base/1x128"


def row(
    peer: str, median: float | None, *, dtype: str = "float32", subnet: str = "w1-d1", at: str = "1"
) -> dict[str, Any]:
    timing: dict[str, Any] = {"error": "no such type\nmore"}
    if median is not None:
        timing = {"median_ms": median, "p20_ms": median * 0.9, "p80_ms": median * 1.2, "n": 9}
    if peer == "ours" and median is not None:
        timing["share_of_peak"] = 0.8
    return {
        "section": "latency",
        "case": f"{PLACE}/{subnet}",
        "peer": peer,
        "dtype": dtype,
        "group": at,
        "threads": 2,
        "commit": "abc",
        "machine": {"hardware": "some CPU", "torch": "2.13.0"},
        **timing,
    }


def own_row(subnet: str, encoder_ms: float) -> dict[str, Any]:
    return {
        "section": "own",
        "case": "outside_encoder",
        "model": "bert-base",
        "shape": {"name": "1x128"},
        "dtype": "float32",
        "subnet": subnet,
        "encoder": {"median_ms": encoder_ms},
        "outside_us": 120.4,
    }


def test_ratio_is_the_best_peers_time_over_ours() -> None:
    rows = [row("ours", 40), row("ours_extracted", 39), row("openvino", 50), row("torch_eager", 90)]
    (group,) = groups_of(rows)
    assert group.best_peer == "openvino"
    assert group.ratio(group.best_peer, "ours") == pytest.approx(1.25)
    assert group.ratio("ours_extracted", "ours") == pytest.approx(0.975)
    line = latency_table([group]).splitlines()[2]
    assert line == (
        "| w1-d1 | float32 | 40.00 (36.00-48.00) | 80% | 0.97x | openvino | 1.25x | 90.00 | 50.00 |"
    )


def test_a_peer_without_a_time_is_never_the_best() -> None:
    (group,) = groups_of([row("ours", 40), row("openvino", None), row("torch_eager", 90)])
    assert group.best_peer == "torch_eager"
    (alone,) = groups_of([row("ours", 40), row("openvino", None)])
    assert alone.best_peer is None
    assert alone.ratio(alone.best_peer, "ours") is None
    assert "| - | - | none |" in latency_table([alone])


def test_the_newest_group_counts_and_groups_do_not_mix() -> None:
    old = [row("ours", 40), row("openvino", 10)]
    new = [row("ours", 30, at="2"), row("torch_eager", 60, at="2")]
    (group,) = groups_of(new + old)
    assert set(group.rows) == {"ours", "torch_eager"}
    assert group.ratio(group.best_peer, "ours") == pytest.approx(2)


def test_groups_come_in_the_order_of_the_cases() -> None:
    names = [("w0.25-d0.5", "int8"), ("w0.5-d1", "float32"), ("w1-d1", "bfloat16")]
    rows = [row("ours", 1, subnet=subnet, dtype=dtype) for subnet, dtype in names]
    rows.append(row("ours", 1, dtype="float32"))
    assert [(group.subnet, group.dtype) for group in groups_of(rows)] == [
        ("w1-d1", "float32"),
        ("w1-d1", "bfloat16"),
        ("w0.5-d1", "float32"),
        ("w0.25-d0.5", "int8"),
    ]


def test_report_names_limits_own_costs_and_reasons() -> None:
    switching = {**own_row("w1-d1|w0.25-d0.5", 1.0), "case": "switching", "switch_us": 3.21}
    rows = [
        {"section": "peak", "case": "fp32", "rate": 570e9},
        {"section": "peak", "case": "bf16", "error": "no such instructions"},
        row("ours", 40),
        row("ctranslate2", None),
        own_row("w1-d1", 40.0),
        own_row("w0.25-d0.5", 5.0),
        switching,
    ]
    text = report(rows)
    assert "some CPU, 2 threads, torch 2.13.0, commit abc" in text
    assert "fp32 570." in text
    assert "| bert-base | 1x128 | float32 | w0.25-d0.5 | 5.000 | 8.00x | 120 |" in text
    assert "Switching, bert-base 1x128 float32: 3.2 us (w1-d1|w0.25-d0.5)" in text
    assert text.endswith("- ctranslate2 float32: no such type\n")


def test_report_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one group"):
        report([own_row("w1-d1", 1.0)])


def test_plot_of_a_place(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    groups = groups_of([row("ours", 40), row("openvino", 50), row("ctranslate2", None)])
    plot(groups, PLACE, tmp_path / "cpu.svg")
    text = (tmp_path / "cpu.svg").read_text()
    assert "<svg" in text
    with pytest.raises(ValueError, match="place='elsewhere', expected one of bert-base/1x128"):
        plot(groups, "elsewhere", tmp_path / "no.svg")
