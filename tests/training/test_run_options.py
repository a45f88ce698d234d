"""What options of a run do to the models and the record it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, DynaBertModel, SubnetConfig
from dynabert.data.examples import TaskData
from dynabert.training import DynaBertTrainer, RunArguments, RunResult, default_stages, run_stages
from dynabert.training import stages as stages_module
from dynabert.training.presets import PRESET_NAMES

MakeData = Callable[..., TaskData]
Run = Callable[..., RunResult]
HALF = SubnetConfig(0.5)


@pytest.fixture
def plain_bert(make_encoder: Callable[..., DynaBertModel], tmp_path: Path) -> Path:
    """A pretrained encoder without a head."""
    make_encoder(seed=4).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def classifier(
    make_model: Callable[..., DynaBertForSequenceClassification], tmp_path: Path
) -> Path:
    """A model with a head, as fine-tuning leaves it."""
    make_model(seed=4).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def arguments(output_dir: Path, **changes: Any) -> RunArguments:
    settings: dict[str, Any] = {
        "widths": (1.0, 0.5),
        "depths": (1.0, 0.5),
        "learning_rate": 5e-3,
        "batch_size": 8,
        "max_length": 24,
        "importance_rows": 16,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "progress": False,
        **{f"{stage}_epochs": 1.0 for stage in ("teacher", "width", "width_depth", "final")},
    }
    return RunArguments(output_dir, **{**settings, **changes})


@pytest.fixture
def run(make_data: MakeData, tokenizer: Any, tmp_path: Path) -> Run:
    """``run(model, stages, problem=..., **changes)``: a run in ``tmp_path / "run"``."""

    def go(model: Path, *stages: str, problem: str = "classification", **changes: Any) -> RunResult:
        asked = arguments(tmp_path / "run", stages=stages, **changes)
        return run_stages(model, make_data(problem), tokenizer, asked)

    return go


def record(run_dir: Path, stage: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / stage / "stage.json").read_text())
    return document


def load(folder: Path) -> DynaBertForSequenceClassification:
    return DynaBertForSequenceClassification.from_pretrained(folder)


def changed(before: Path, after: Path) -> set[str]:
    """Names of the weights that differ between two checkpoints."""
    former = load(before).state_dict()
    return {n for n, value in load(after).state_dict().items() if not torch.equal(value, former[n])}


@pytest.mark.parametrize(("rule", "kept"), [("paper", 1), ("reference", 0)])
def test_depth_rule_chooses_the_layer_that_is_trained(
    rule: str, kept: int, classifier: Path, run: Run
) -> None:
    result = run(classifier, "final", widths=(1.0,), depths=(0.5,), depth_rule=rule)
    model = load(result.model_dir)
    assert model.config.depth_rule == rule
    shape = model.subnet_shape(SubnetConfig(depth_mult=0.5))
    assert [layer.index for layer in shape.layers] == [kept]
    trained = {name for name in changed(classifier, result.model_dir) if ".layer." in name}
    assert trained
    assert all(f".layer.{kept}." in name for name in trained)


def test_a_single_narrow_subnet_is_rewired_and_trained_alone(classifier: Path, run: Run) -> None:
    result = run(classifier, "final", widths=(0.5,), depths=(1.0,))
    assert [row.subnet for row in result.report.rows] == [HALF]
    model = load(result.model_dir)
    assert model.rewiring is not None
    rewiring = record(result.model_dir.parent, "final")["rewiring"]
    assert set(rewiring["before"]) == set(rewiring["after"]) == {"w0.5-d1"}
    # What the subnet does not run stays as rewiring has left it.
    former, now = load(classifier), model
    for index, order in enumerate(model.rewiring.head_order):
        before = former.dynabert.encoder.layer[index].attention.packed().qkv_weight[order]
        after = now.dynabert.encoder.layer[index].attention.packed().qkv_weight
        assert torch.equal(after[2:], before[2:])
        assert not torch.equal(after[:2], before[:2])


def test_a_shallow_subnet_can_be_trained_alone_from_a_pretrained_model(
    plain_bert: Path, run: Run
) -> None:
    result = run(plain_bert, "final", widths=(1.0,), depths=(0.5,))
    assert load(result.model_dir).rewiring is None
    assert [row.subnet.name for row in result.report.rows] == ["w1-d0.5"]


def test_a_narrow_subnet_needs_a_fine_tuned_model_to_be_rewired(
    plain_bert: Path, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="Begin with the teacher stage"):
        run(plain_bert, "final", widths=(0.5,), depths=(1.0,))
    result = run(plain_bert, "teacher", "final", widths=(0.5,), depths=(1.0,))
    assert record(tmp_path / "run", "final")["starts_from"] == "teacher"
    assert len(result.report.rows) == 1


def test_several_subnets_need_the_full_network(
    config: DynaBertConfig, classifier: Path, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected the full network among them, or one subnet"):
        run(classifier, "width-depth", widths=(0.5, 0.25), depths=(1.0,))
    # Depths that no stage of the run uses do not matter.
    lone = arguments(tmp_path, stages=("width",), widths=(0.5,))
    assert default_stages(lone, config)[0].subnets == (HALF,)


def test_without_rewiring_heads_and_neurons_stay_in_place(
    classifier: Path, run: Run, tmp_path: Path
) -> None:
    result = run(classifier, "final", rewire=False, widths=(0.5,), depths=(1.0,))
    assert load(result.model_dir).rewiring is None
    assert record(tmp_path / "run", "final")["rewiring"] is None
    qkv = [
        load(path).dynabert.encoder.layer[0].attention.packed().qkv_weight
        for path in (classifier, result.model_dir)
    ]
    assert torch.equal(qkv[0][2:], qkv[1][2:])
    assert not torch.equal(qkv[0][:2], qkv[1][:2])


def test_without_distillation_stages_learn_from_labels(
    classifier: Path, run: Run, tmp_path: Path, config: DynaBertConfig
) -> None:
    asked = arguments(tmp_path, distillation=False)
    assert [stage.teacher for stage in default_stages(asked, config)] == [None] * 4
    run(classifier, "width", distillation=False)
    assert record(tmp_path / "run", "width")["teacher"] is None


def test_without_labels_there_must_be_a_teacher(plain_bert: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distillation=False on task toy-text, which has no label"):
        run(plain_bert, "width", problem="none", distillation=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("learned", [True, False])
def test_head_of_a_regression_learns_from_the_teacher_or_not_at_all(
    learned: bool, plain_bert: Path, run: Run, tmp_path: Path
) -> None:
    run(plain_bert, "teacher", "width", problem="regression", regression_logits=learned)
    trained = changed(tmp_path / "run" / "teacher", tmp_path / "run" / "width")
    assert any("encoder" in name for name in trained)
    head = {name for name in trained if "pooler" in name or "classifier" in name}
    assert len(head) == (4 if learned else 0)


@pytest.mark.parametrize("padded", [True, False])
def test_hidden_padding_pads_training_rows_to_max_length(
    padded: bool, classifier: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, stages = set(), []
    training_step = DynaBertTrainer.training_step

    def watched(self: DynaBertTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        lengths.add(inputs["input_ids"].shape[1])
        stages.append(self._stage)
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(DynaBertTrainer, "training_step", watched)
    run(classifier, "width", hidden_padding=padded)
    assert all(stage.hidden_padding is padded for stage in stages)
    assert (lengths == {24}) is padded
    assert max(lengths) <= 24


@pytest.mark.parametrize(
    ("rule", "batch_size", "rows", "num_batches"),
    [("reference", 8, None, 4), ("paper", None, 20, 3)],
)
def test_importance_is_scored_as_asked_and_recorded(
    rule: str,
    batch_size: int | None,
    rows: int | None,
    num_batches: int,
    classifier: Path,
    run: Run,
    make_data: MakeData,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[Any] = []
    compute_importance = stages_module.compute_importance

    def watched(model: Any, dataloader: Any, **options: Any) -> Any:
        batches.extend(dataloader)
        return compute_importance(model, dataloader, **options)

    monkeypatch.setattr(stages_module, "compute_importance", watched)
    result = run(
        classifier,
        "width",
        importance_source="dev",
        importance_rows=rows,
        importance_rule=rule,
        importance_batch_size=batch_size,
    )
    rewiring = load(result.model_dir).rewiring
    assert rewiring is not None
    expected = {
        "rows": "dev",
        "rule": rule,
        "batch_size": 8,  # that of training, where there is none of its own
        "num_rows": rows or 32,
        "num_batches": num_batches,
    }
    assert {name: rewiring.provenance[name] for name in expected} == expected
    scored = [tuple(ids[ids != 0].tolist()) for batch in batches for ids in batch["input_ids"]]
    texts = [example.text for example in make_data().validation[: rows or 32]]
    in_order = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    assert sorted(scored) == sorted(in_order)
    assert (scored == in_order) is (rule == "reference")


def test_all_importance_rows_are_a_tenth_of_the_training_rows(classifier: Path, run: Run) -> None:
    rewiring = load(run(classifier, "width", importance_rows=None).model_dir).rewiring
    assert rewiring is not None
    assert rewiring.provenance["num_rows"] == 6  # of 64


def test_grid_is_evaluated_at_steps_and_the_best_is_kept(
    classifier: Path, run: Run, tmp_path: Path
) -> None:
    result = run(classifier, "width", width_epochs=3, eval_steps=4, save_steps=3)
    done = record(tmp_path / "run", "width")
    scores = {e["step"]: e["eval_grid_mean"] for e in done["log"] if "eval_grid_mean" in e}
    assert done["steps"] == 24
    assert set(scores) == {4, 8, 12, 16, 20, 24}
    assert done["metrics"]["grid_mean"] == max(scores.values())
    assert result.report.mean == pytest.approx(max(scores.values()))


def test_a_run_evaluated_at_steps_goes_on_to_the_same_model(
    classifier: Path,
    make_data: MakeData,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def go(name: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"width_epochs": 2, "eval_steps": 3, "save_steps": 100}
        asked = arguments(tmp_path / name, stages=("width",), **settings)
        run_stages(classifier, make_data(), tokenizer, asked)
        return record(asked.output_dir, "width")

    whole = go("whole")
    training_step = DynaBertTrainer.training_step

    def interrupted(self: DynaBertTrainer, *args: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return training_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DynaBertTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go("parts")
    resumed = go("parts")
    assert resumed["resumed_from"] == "checkpoint-6"
    scores = [
        [(e["step"], e["eval_grid_mean"]) for e in done["log"] if "eval_grid_mean" in e]
        for done in (whole, resumed)
    ]
    assert scores[0] == scores[1]
    assert changed(tmp_path / "whole" / "model", tmp_path / "parts" / "model") == set()


def test_best_model_of_a_score_can_be_chosen_as_the_original_code_does(
    plain_bert: Path, run: Run, tmp_path: Path
) -> None:
    run(plain_bert, "teacher", problem="regression", selection_metric="reference")
    metrics = record(tmp_path / "run", "teacher")["metrics"]
    assert metrics["grid_mean"] == metrics["w1-d1_pearson"] != metrics["w1-d1_spearman"]


def test_metric_that_the_task_does_not_have_is_refused(
    plain_bert: Path, run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="selection_metric='f1', expected one of accuracy"):
        run(plain_bert, "teacher", selection_metric="f1")
    assert not (tmp_path / "run").exists()


def test_every_stage_can_have_its_own_learning_rate(config: DynaBertConfig, tmp_path: Path) -> None:
    asked = arguments(tmp_path, learning_rate=1e-3, width_learning_rate=2e-3, final_epochs=0.5)
    rates = {stage.name: stage.learning_rate for stage in default_stages(asked, config)}
    assert rates == {"teacher": 1e-3, "width": 2e-3, "width-depth": 1e-3, "final": 1e-3}
    assert [asked.epochs_of(stage) for stage in ("width", "final")] == [1.0, 0.5]


def test_learning_rate_of_a_stage_is_the_one_it_trains_with(
    classifier: Path, run: Run, tmp_path: Path
) -> None:
    run(classifier, "width", width_learning_rate=1e-4)
    rates = [e["learning_rate"] for e in record(tmp_path / "run", "width")["log"] if "loss" in e]
    assert rates[0] == pytest.approx(1e-4)


def test_fields_of_stages_that_have_not_run_are_free(tmp_path: Path) -> None:
    teacher = arguments(tmp_path, stages=("teacher",))
    changes: dict[str, Any] = {
        "width_learning_rate": 1e-4,
        "distillation": False,
        "rewire": False,
        "importance_rule": "reference",
        "augmented_file": tmp_path / "more.csv",
        "report_to": ("tensorboard",),
        "run_name": "again",
        "depth_rule": "reference",
        "eval_steps": 7,
    }
    asked = replace(teacher, stages=("teacher", "width", "final"), **changes)
    assert asked.differences(teacher) == ["depth_rule", "eval_steps"]
    former = replace(teacher, stages=("teacher", "final"))
    assert "rewire" in asked.differences(former)
    assert "distillation" not in asked.differences(former)


def test_arguments_survive_json(tmp_path: Path) -> None:
    asked = arguments(
        tmp_path,
        depth_rule="reference",
        augmented_file=tmp_path / "more.csv",
        report_to=("tensorboard", "wandb"),
        importance_rows=None,
        teacher_learning_rate=1e-4,
        probe_subnets=(HALF,),
    )
    assert RunArguments.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth_rule": "last"}, "depth_rule='last', expected one of paper, reference"),
        ({"long_texts": "drop"}, "long_texts='drop', expected one of error, cut"),
        ({"importance_batch_size": 0}, "importance_batch_size=0, expected a finite number of at"),
        ({"importance_rows": 0}, "importance_rows=0, expected a finite number of at least 1"),
        ({"eval_steps": 0}, "eval_steps=0, expected a finite number of at least 1"),
        ({"width_learning_rate": 0.0}, r"width_learning_rate=0\.0, expected .* above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RunArguments(tmp_path, **changes)


def test_integrations_are_a_tuple(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Write \('tensorboard',\)"):
        RunArguments(tmp_path, report_to="tensorboard")  # type: ignore[arg-type]


def test_paper_is_the_default_written_down(tmp_path: Path) -> None:
    default = RunArguments(tmp_path)
    assert RunArguments.preset("paper", tmp_path) == replace(default, depth_rule="paper")


def test_reference_differs_from_the_paper_where_the_codes_do(tmp_path: Path) -> None:
    paper, reference = (RunArguments.preset(name, tmp_path) for name in ("paper", "reference"))
    different = {
        field.name
        for field in fields(RunArguments)
        if getattr(paper, field.name) != getattr(reference, field.name)
    }
    assert different == {
        "depth_rule",
        "width_depth_teacher",
        "importance_rule",
        "importance_source",
        "importance_rows",
        "importance_batch_size",
        "hidden_padding",
        "regression_logits",
        "max_length",
        "group_by_length",
        "eval_steps",
        "selection_metric",
        "bf16",
    }
    roberta = RunArguments.preset("reference-roberta", tmp_path)
    assert roberta == replace(reference, warmup_ratio=0.06)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_what_is_said_overrides_a_preset(name: Any, tmp_path: Path) -> None:
    asked = RunArguments.preset(name, tmp_path, learning_rate=1e-3, subnet_sampling="sampled")
    assert (asked.learning_rate, asked.subnet_sampling) == (1e-3, "sampled")
    assert asked.width_weights == (1.0, 0.1)


def test_unknown_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preset='fast', expected one of paper, reference"):
        RunArguments.preset("fast", tmp_path)  # type: ignore[arg-type]


def test_a_run_as_in_the_original_code(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    asked = RunArguments.preset(
        "reference",
        tmp_path / "run",
        widths=(1.0, 0.5),
        depths=(1.0, 0.5),
        max_length=24,
        use_cpu=True,
        progress=False,
    )
    result = run_stages(plain_bert, make_data(), tokenizer, asked)
    model = load(result.model_dir)
    assert model.config.depth_rule == "reference"
    assert model.rewiring is not None
    assert model.rewiring.provenance["rule"] == "reference"
    assert record(tmp_path / "run", "width-depth")["teacher"] == "full"
    assert len(result.report.rows) == 4
