"""A whole run on a toy task: what it writes, that it resumes exactly, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, DynaBertModel, SubnetConfig
from dynabert.data.examples import TaskData
from dynabert.report import GridReport
from dynabert.training import DynaBertTrainer, RunArguments, Stage, default_stages, run_stages
from dynabert.training.checkpoint import newest_complete_checkpoint
from dynabert_kernels import use_backend

ALL = ("teacher", "width", "width-depth", "final")
MakeData = Callable[..., TaskData]


@pytest.fixture
def plain_bert(make_encoder: Callable[..., DynaBertModel], tmp_path: Path) -> Path:
    """A pretrained encoder without a head, with dropout, so that random states matter."""
    folder = tmp_path / "bert"
    make_encoder(seed=4, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).save_pretrained(
        folder
    )
    return folder


def arguments(output_dir: Path, **changes: Any) -> RunArguments:
    settings: dict[str, Any] = {
        "stages": ALL,
        "widths": (1.0, 0.5, 0.25),
        "learning_rate": 5e-3,
        "batch_size": 8,
        "max_length": 24,
        "importance_rows": 16,
        "teacher_epochs": 2,
        "width_epochs": 2,
        "width_depth_epochs": 1,
        "final_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 2,
        "save_steps": 3,
        "progress": False,
    }
    return RunArguments(output_dir, **{**settings, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = DynaBertForSequenceClassification.from_pretrained(folder)
    return dict(model.state_dict())


def stage_record(run_dir: Path, stage: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / stage / "stage.json").read_text())
    return record


def test_a_run_trains_all_stages_and_reports_the_grid(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    asked = arguments(run_dir, teacher_epochs=8, width_epochs=4)
    with use_backend("reference"):  # whether so small a network learns depends on its dropout masks
        result = run_stages(plain_bert, make_data(), tokenizer, asked)

    model = DynaBertForSequenceClassification.from_pretrained(result.model_dir)
    assert model.rewiring is not None
    assert model.rewiring.provenance["rows"] == "holdout"
    assert model.rewiring.provenance["num_rows"] == 6  # a tenth of 64 training rows
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert (result.model_dir / "tokenizer_config.json").exists()
    assert len(result.report.rows) == 6
    assert result.report.mean > 0.8
    assert GridReport.load(run_dir / "grid.json") == result.report
    assert "depth" in (run_dir / "grid.md").read_text()

    run = json.loads((run_dir / "run.json").read_text())
    assert run["data"]["fingerprint"] == "classification-64-32"
    assert RunArguments.from_dict(run["arguments"]) == asked

    starts = [stage_record(run_dir, stage)["starts_from"] for stage in ALL]
    assert starts == [str(plain_bert), "teacher", "width", "width-depth"]
    probed = stage_record(run_dir, "width")["rewiring"]
    assert set(probed) == {"before", "after"}
    assert set(probed["after"]) == {"w0.25-d1"}
    assert [stage_record(run_dir, s)["rewiring"] is None for s in ALL] == [True, False, True, True]
    for stage in ALL:
        record = stage_record(run_dir, stage)
        assert record["done"] and record["seconds"] > 0
        assert record["metrics"]["grid_mean"] >= 0
        assert any("loss_w1-d1" in entry for entry in record["log"])
        leftovers = {path.name for path in (run_dir / stage).iterdir()}
        assert not leftovers & {"checkpoints", "rewired"}
        assert not list((run_dir / stage).rglob("*.bin"))
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]


def test_the_best_epoch_is_kept(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = arguments(run_dir, stages=("teacher", "width"), width_epochs=4)
    result = run_stages(plain_bert, make_data(num_val=48), tokenizer, run)
    record = stage_record(run_dir, "width")
    evaluated = [e["eval_grid_mean"] for e in record["log"] if "eval_grid_mean" in e]
    assert len(evaluated) == 4
    assert record["metrics"]["grid_mean"] == max(evaluated)
    assert result.report.mean == pytest.approx(max(evaluated))


class Interruption(Exception):
    """Stands for whatever ends a process in the middle of a stage."""


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        pytest.param("width", 5, marks=pytest.mark.slow),
        ("width", 12),
        ("width-depth", 4),
    ],
    ids=lambda v: str(v),
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    stage: str,
    step: int,
    plain_bert: Path,
    make_data: MakeData,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_data()
    stages = ("teacher", "width", "width-depth")
    settings: dict[str, Any] = {"stages": stages, "subnet_sampling": "sampled"}
    run_stages(plain_bert, data, tokenizer, arguments(tmp_path / "whole", **settings))

    training_step = DynaBertTrainer.training_step

    def interrupted(self: DynaBertTrainer, *args: Any, **kwargs: Any) -> Any:
        if self._stage.name == stage and self.state.global_step == step:
            raise Interruption
        return training_step(self, *args, **kwargs)

    run = arguments(tmp_path / "parts", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(DynaBertTrainer, "training_step", interrupted)
        with pytest.raises(Interruption):
            run_stages(plain_bert, data, tokenizer, run)
    newest = newest_complete_checkpoint(run.output_dir / stage / "checkpoints")
    assert newest is not None
    # What a process leaves behind that dies while it writes a checkpoint.
    torn = newest.with_name("checkpoint-999")
    shutil.copytree(newest, torn)
    (torn / "optimizer.pt").unlink()
    finished = (run.output_dir / "teacher" / "stage.json").stat().st_mtime_ns

    torch.manual_seed(99)  # the process that goes on starts with another random state
    run_stages(plain_bert, data, tokenizer, run)
    record = stage_record(run.output_dir, stage)
    assert record["resumed_from"] == newest.name
    assert (run.output_dir / "teacher" / "stage.json").stat().st_mtime_ns == finished
    expected = weights(tmp_path / "whole" / "model")
    for name, value in weights(tmp_path / "parts" / "model").items():
        assert torch.equal(value, expected[name]), name


def test_a_finished_run_is_not_trained_again(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    run = arguments(tmp_path / "run", stages=("teacher",), teacher_epochs=1)
    first = run_stages(plain_bert, make_data(), tokenizer, run)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(DynaBertTrainer, "train", refuse)
    assert run_stages(plain_bert, make_data(), tokenizer, run) == first


def test_stages_can_start_from_a_fine_tuned_model(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data()
    run_stages(plain_bert, data, tokenizer, arguments(tmp_path / "a", stages=("teacher",)))
    tuned = tmp_path / "a" / "model"
    run = arguments(tmp_path / "b", stages=("width", "width-depth"))
    result = run_stages(tuned, data, tokenizer, run)
    assert stage_record(run.output_dir, "width")["starts_from"] == str(tuned)
    assert len(result.report.rows) == 6
    # A model that has been rewired is not rewired again.
    again = arguments(tmp_path / "c", stages=("width-depth",))
    run_stages(result.model_dir, data, tokenizer, again)
    assert stage_record(again.output_dir, "width-depth")["rewiring"] is None


def test_regression_trains_and_scores_the_correlation(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(
        tmp_path / "run", stages=("teacher", "width"), teacher_epochs=10, width_epochs=4
    )
    result = run_stages(plain_bert, make_data("regression", 96), tokenizer, run)
    assert result.report.primary_metric == "spearman"
    assert result.report.mean > 0.7
    model = DynaBertForSequenceClassification.from_pretrained(result.model_dir)
    assert model.config.problem_type == "regression" and model.config.num_labels == 1


def test_importance_can_come_from_the_dev_rows(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(
        tmp_path / "run",
        stages=("teacher", "width"),
        teacher_epochs=1,
        width_epochs=1,
        importance_source="dev",
        importance_rule="reference",
        probe_subnets=(),
    )
    result = run_stages(plain_bert, make_data(), tokenizer, run)
    rewiring = DynaBertForSequenceClassification.from_pretrained(result.model_dir).rewiring
    assert rewiring is not None
    assert rewiring.provenance["rows"] == "dev" and rewiring.provenance["rule"] == "reference"
    assert rewiring.provenance["num_rows"] == 16
    assert stage_record(run.output_dir, "width")["rewiring"] == {"before": {}, "after": {}}


def test_a_model_without_a_fine_tuned_head_is_refused(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run", stages=("width",))
    with pytest.raises(ValueError, match=r"classifier\.weight.*Begin with the teacher stage"):
        run_stages(plain_bert, make_data(), tokenizer, run)


def test_nothing_is_written_for_a_grid_that_does_not_fit(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run", depths=(1.0, 0.75))
    with pytest.raises(ValueError, match=r"depth_mult=0\.75 is 1\.5 of 2 layers"):
        run_stages(plain_bert, make_data(), tokenizer, run)
    assert not run.output_dir.exists()


def test_labels_are_needed_by_some_stages(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run")
    with pytest.raises(ValueError, match="Leave out teacher and final"):
        run_stages(plain_bert, make_data("none"), tokenizer, run)
    assert not run.output_dir.exists()


def test_a_folder_with_another_run_is_refused(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run", stages=("teacher",), teacher_epochs=1)
    run_stages(plain_bert, make_data(), tokenizer, run)
    with pytest.raises(ValueError, match="holds a run with another seed, learning_rate"):
        run_stages(plain_bert, make_data(), tokenizer, replace(run, learning_rate=1e-4, seed=1))
    with pytest.raises(ValueError, match="holds a run with another data"):
        run_stages(plain_bert, make_data(num_train=40), tokenizer, run)
    more = replace(run, stages=("teacher", "width"), width_epochs=1)
    run_stages(plain_bert, make_data(), tokenizer, more)
    with pytest.raises(ValueError, match="holds a run with another width_epochs"):
        run_stages(plain_bert, make_data(), tokenizer, replace(more, width_epochs=3))
    with pytest.raises(ValueError, match=r"stage width in .* started from teacher"):
        run_stages(plain_bert, make_data(), tokenizer, replace(more, stages=("width",)))


def test_default_stages_are_the_papers(config: DynaBertConfig, tmp_path: Path) -> None:
    run = RunArguments(tmp_path, widths=(1, 0.5), depths=(1, 0.5))
    teacher, width, both, final = default_stages(run, config)
    full, half = SubnetConfig(), SubnetConfig(0.5)
    assert (teacher.subnets, teacher.teacher) == ((full,), None)
    assert (width.subnets, width.teacher) == ((full, half), "full")
    assert (width.logit_weight, width.hidden_weight) == (1.0, 0.1)
    assert both.subnets == (full, half, SubnetConfig(1, 0.5), SubnetConfig(0.5, 0.5))
    assert (both.teacher, both.logit_weight, both.hidden_weight) == ("same-width", 1.0, 1.0)
    assert (final.subnets, final.teacher) == (both.subnets, None)


@pytest.mark.parametrize(
    ("stages", "is_rewired", "teacher"),
    [
        (("width", "width-depth"), False, "same-width"),
        (("width-depth",), True, "same-width"),
        (("teacher", "width-depth"), False, "full"),
    ],
    ids=["after-width", "rewired-before", "never-narrow"],
)
def test_narrow_teachers_must_have_been_trained(
    stages: Any, is_rewired: bool, teacher: str, config: DynaBertConfig, tmp_path: Path
) -> None:
    run = RunArguments(tmp_path, stages=stages)
    assert default_stages(run, config, is_rewired=is_rewired)[-1].teacher == teacher


def test_final_trains_what_was_trained_before(config: DynaBertConfig, tmp_path: Path) -> None:
    run = RunArguments(tmp_path, stages=("teacher", "width", "final"))
    _, width, final = default_stages(run, config)
    assert final.subnets == width.subnets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("width", "teacher")}, "stages='width,teacher'"),
        ({"stages": ()}, "stages=''"),
        ({"stages": ("polish",)}, "stages='polish'"),
        ({"width_depth_teacher": "best"}, "width_depth_teacher='best', expected one of full"),
        ({"batch_size": 0}, "batch_size=0, expected a finite number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"final_epochs": 0}, r"final_epochs=0, expected a finite number above 0"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_run_arguments_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RunArguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subnets": (SubnetConfig(0.5), SubnetConfig(0.25))}, "expected the full network among"),
        ({"subnets": (SubnetConfig(), SubnetConfig())}, "expected each only once"),
        ({"teacher": "full", "logit_weight": 0.0}, "Nothing would be learned"),
        ({"hidden_weight": -1.0}, r"hidden_weight=-1\.0"),
    ],
    ids=["no-full", "twice", "no-weight", "negative"],
)
def test_bad_stages_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**{"name": "s", "subnets": (SubnetConfig(),), **changes})
