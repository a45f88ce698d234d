"""The folder of a run after its process died between two of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert import DynaBertForSequenceClassification, DynaBertModel
from dynabert.cli.train import check_folder
from dynabert.data.examples import TaskData
from dynabert.json_file import read_json
from dynabert.report import GridReport
from dynabert.training import RunArguments, run_stages
from dynabert.training.run_folder import RunFolder

MakeData = Callable[..., TaskData]
MakeModel = Callable[..., DynaBertForSequenceClassification]


class Interruption(Exception):
    """Stands for whatever ends a process."""


def arguments(output_dir: Path, **changes: Any) -> RunArguments:
    settings: dict[str, Any] = {
        "stages": ("teacher",),
        "widths": (1.0, 0.5),
        "batch_size": 8,
        "max_length": 24,
        "teacher_epochs": 1,
        "width_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "progress": False,
    }
    return RunArguments(output_dir, **{**settings, **changes})


def test_a_run_that_goes_on_elsewhere_says_what_is_different(
    make_data: MakeData, make_model: MakeModel, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    folder, data = RunFolder(tmp_path), make_data()
    run = arguments(tmp_path)
    folder.begin(run, data, "model", bf16=False)
    folder.begin(run, data, "model", bf16=False)
    assert not caplog.messages
    torch.set_num_threads(2)
    folder.begin(run, data, "model", bf16=True)
    (warning,) = caplog.messages
    assert "goes on with bf16=True (was False), threads=2 (was 1): its weights will not" in warning
    caplog.clear()
    torch.set_num_threads(1)
    folder.finish("teacher", make_model(), tokenizer, {})
    folder.begin(run, data, "model", bf16=True)
    assert not caplog.messages
    # A finished run is only looked at, so its record stays that of the processes that trained it.
    assert read_json(tmp_path / "run.json", schema=1)["numerics"]["threads"] == 2


def test_a_finished_stage_takes_the_place_of_its_checkpoints(
    make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoint_dir("width") / "checkpoint-3").mkdir(parents=True)
    folder.start_dir("width").mkdir()
    folder.finish("width", make_model(), tokenizer, {"steps": 3})
    record = folder.finished("width")
    assert record is not None and record["done"] and record["steps"] == 3
    assert {"model.safetensors", "config.json", "tokenizer_config.json", "stage.json"} <= {
        path.name for path in folder.stage_dir("width").iterdir()
    }
    assert not folder.checkpoint_dir("width").exists() and not folder.start_dir("width").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["width"]


def test_a_process_that_dies_while_finishing_leaves_the_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.checkpoint_dir("width") / "checkpoint-3").mkdir(parents=True)
    folder.stage_dir("width").rename(tmp_path / ".width.former")
    (tmp_path / ".width.staged").mkdir()
    assert folder.finished("width") is None
    folder.recover("width")
    assert (folder.checkpoint_dir("width") / "checkpoint-3").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["width"]


def test_the_grid_of_a_former_stage_is_not_taken_for_that_of_the_last(
    make_data: MakeData,
    make_encoder: Callable[..., DynaBertModel],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_encoder(seed=4).save_pretrained(tmp_path / "bert")
    run, data = arguments(tmp_path / "run"), make_data()
    assert len(run_stages(tmp_path / "bert", data, tokenizer, run).report.rows) == 1

    def interrupted(report: GridReport, path: Path) -> None:
        raise Interruption

    longer = replace(run, stages=("teacher", "width"))
    with monkeypatch.context() as patch:
        patch.setattr(GridReport, "save", interrupted)
        with pytest.raises(Interruption):
            run_stages(tmp_path / "bert", data, tokenizer, longer)
    assert len(run_stages(tmp_path / "bert", data, tokenizer, longer).report.rows) == 2


def test_a_folder_with_nothing_but_leftovers_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0f.staged").write_text("{")
    check_folder(tmp_path, overwrite=False)
    (tmp_path / "notes").write_text("")
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        check_folder(tmp_path, overwrite=False)
