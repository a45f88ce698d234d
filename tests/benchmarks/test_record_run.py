"""A finished run becomes rows that name no folder; an unfinished one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.record_run import run_rows
from dynabert.report import GridReport, SubnetRecord
from dynabert.subnet import SubnetConfig


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What `dynabert train` leaves behind, one stage and two subnets."""
    run = {
        "schema": 1,
        "model": str(tmp_path / "encoder"),
        "task": "sst2",
        "data": {
            "source": str(tmp_path / "SST-2"),
            "fingerprint": "f00d",
            "train_rows": 70,
            "validation_rows": 7,
        },
        "arguments": {"output_dir": str(tmp_path), "stages": ["width"], "seed": 3},
        "versions": {"python": "3.11.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    stage = {
        "schema": 1,
        "done": True,
        "name": "width",
        "starts_from": str(tmp_path / "encoder"),
        "teacher": "full",
        "rewiring": {"before": {"w0.5-d1": 0.5}, "after": {"w0.5-d1": 0.7}},
        "metrics": {"grid_mean": 0.85},
        "steps": 9,
        "seconds": 1.5,
        "log": [],
    }
    (tmp_path / "width").mkdir()
    (tmp_path / "width" / "stage.json").write_text(json.dumps(stage))
    records = [
        SubnetRecord(SubnetConfig(width), {"accuracy": score}, score, 7, 2, (4, 4), (8, 8), 100, 50)
        for width, score in ((1.0, 0.9), (0.5, 0.8))
    ]
    GridReport("sst2", "accuracy", 128, tuple(records)).save(tmp_path / "grid.json")
    return tmp_path


def test_rows_hold_the_run_its_stages_and_its_grid(run_dir: Path) -> None:
    run, stage, full, half = run_rows(run_dir, "tiny")
    assert run["grid_mean"] == pytest.approx(0.85)
    assert (run["train_rows"], run["arguments"]) == (70, {"stages": ["width"], "seed": 3})
    assert run["machine"]["torch"] == "2.13.0"
    assert stage["rewiring"]["after"] == {"w0.5-d1": 0.7}
    assert (full["width"], full["metrics"]) == (1.0, {"accuracy": 0.9})
    assert (half["width"], half["parameters"], half["median_ms"]) == (0.5, 100, None)
    assert {row["run"] for row in (run, stage, full, half)} == {"tiny"}


def test_rows_name_no_folder(run_dir: Path) -> None:
    assert str(run_dir) not in json.dumps(run_rows(run_dir, "tiny"))


def test_an_unfinished_run_is_refused(run_dir: Path) -> None:
    (run_dir / "grid.json").unlink()
    with pytest.raises(FileNotFoundError):
        run_rows(run_dir, "tiny")
