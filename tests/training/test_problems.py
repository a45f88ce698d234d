"""Every kind of problem through whole runs, and the tasks no run may begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dynabert import (
    DynaBertConfig,
    DynaBertForQuestionAnswering,
    DynaBertForSequenceClassification,
    DynaBertForTokenClassification,
    DynaBertModel,
    SubnetConfig,
)
from dynabert.data.collators import DynamicPadCollator
from dynabert.data.examples import Example, Problem, TaskData, TaskSpec
from dynabert.data.tasks import load_task
from dynabert.evaluation import evaluate_grid
from dynabert.report import GridReport
from dynabert.training import DynaBertTrainer, RunArguments, Stage, run_stages
from dynabert.training.problems import MODEL_CLASSES, PreparedTask, encode_examples, row_length

ALL = ("teacher", "width", "width-depth", "final")
FULL, NARROW, HALF = SubnetConfig(), SubnetConfig(0.5), SubnetConfig(0.5, 0.5)
MakeData = Callable[..., TaskData]
HEADS = {
    "token-classification": DynaBertForTokenClassification,
    "question-answering": DynaBertForQuestionAnswering,
}


@pytest.fixture
def roberta(byte_level_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A random RoBERTa encoder of two layers with its byte-level tokeniser."""
    config = DynaBertConfig(
        architecture="roberta",
        vocab_size=len(byte_level_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    DynaBertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


@pytest.fixture
def bert(make_encoder: Callable[..., DynaBertModel], tmp_path: Path) -> Path:
    make_encoder(seed=4).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def arguments(output_dir: Path, **changes: Any) -> RunArguments:
    settings: dict[str, Any] = {
        "stages": ALL,
        "widths": (1.0, 0.5),
        "depths": (1.0, 0.5),
        "learning_rate": 5e-3,
        "batch_size": 8,
        "importance_rows": 16,
        "bf16": False,
        "use_cpu": True,
        "progress": False,
        **dict.fromkeys(("teacher_epochs", "width_epochs", "width_depth_epochs"), 1),
        "final_epochs": 1,
    }
    return RunArguments(output_dir, **{**settings, **changes})


def pairs_of_texts(data: TaskData, num_classes: int = 2) -> TaskData:
    """The toy task with its texts cut in two, and further classes by the length of the first."""

    def pair(item: Any) -> Example:
        words = item.text.split()
        label = item.label
        if isinstance(label, int):
            label = (label + 2 * (len(words) % 2)) % num_classes
        return Example(" ".join(words[:1]), " ".join(words[1:]), label, item.line)

    names = tuple("abcd"[:num_classes]) if data.spec.label_names else ()
    spec = replace(data.spec, text_fields=("first", "second"), label_names=names)
    return replace(
        data,
        spec=spec,
        train=[pair(item) for item in data.train],
        validation=[pair(item) for item in data.validation],
    )


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("pairs", "bert"),
        pytest.param("pairs", "roberta", marks=pytest.mark.slow),
        pytest.param("four-classes", "roberta", marks=pytest.mark.slow),
        ("scored-pairs", "bert"),
        pytest.param("scored-pairs", "roberta", marks=pytest.mark.slow),
        ("token-classification", "bert"),
        ("token-classification", "roberta"),
        ("question-answering", "bert"),
        pytest.param("question-answering", "roberta", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_every_stage_of_every_problem(
    kind: str,
    architecture: str,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerBase,
    byte_level_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model_path = request.getfixturevalue(architecture)
    chosen = tokenizer if architecture == "bert" else byte_level_tokenizer
    problem = {"pairs": "classification", "four-classes": "classification"}.get(kind, kind)
    problem = "regression" if kind == "scored-pairs" else problem
    data = make_data(problem, 40, 16)
    if problem not in HEADS:
        data = pairs_of_texts(data, 4 if kind == "four-classes" else 2)
    run = arguments(tmp_path / "run", gradient_accumulation_steps=2)
    result = run_stages(model_path, data, chosen, run)

    head = HEADS.get(kind, DynaBertForSequenceClassification)
    loaded: Any = head.from_pretrained(result.model_dir, output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    assert loaded[0].config.num_labels == data.spec.num_labels
    if data.spec.label_names:
        assert tuple(loaded[0].config.id2label.values()) == data.spec.label_names
    report = GridReport.load(run.output_dir / "grid.json")
    assert [row.subnet.name for row in report.rows] == ["w1-d1", "w0.5-d1", "w1-d0.5", "w0.5-d0.5"]
    assert tuple(report.rows[0].metrics) == data.spec.metrics
    assert report.primary_metric == data.spec.primary_metric
    assert report.rows[0].num_rows == 16
    for stage in ALL:
        record = json.loads((run.output_dir / stage / "stage.json").read_text())
        assert record["steps"] == (3 if problem != "question-answering" else record["steps"])
    assert record["metrics"]["grid_mean"] == pytest.approx(report.mean)


@pytest.mark.parametrize("problem", ["token-classification", "question-answering"])
def test_every_subnet_learns(
    problem: str,
    bert: Path,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    run = arguments(
        tmp_path / "run", stages=ALL[:3], teacher_epochs=8, width_epochs=4, width_depth_epochs=6
    )
    result = run_stages(bert, make_data(problem, 128, 32), tokenizer, run)
    assert min(row.primary for row in result.report.rows) > 0.8
    rewiring = json.loads((run.output_dir / "width" / "stage.json").read_text())["rewiring"]
    assert set(rewiring["after"]["w0.5-d1"]) == set(result.report.rows[0].metrics)
    # The scores are those of the saved model.
    task = PreparedTask(str(bert), make_data(problem, 128, 32), tokenizer, run)
    (row,) = task.evaluate(task.load(str(result.model_dir)), [HALF])
    assert row.metrics == result.report.rows[-1].metrics


def trainer_on(
    problem: str, rows: Any, tokenizer: Any, make_arguments: Any, stage: Stage, **settings: Any
) -> DynaBertTrainer:
    num_labels = 5 if problem == "token-classification" else 2
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = DynaBertConfig(
            vocab_size=21,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            num_labels=num_labels,
        )
        models.append(HEADS[problem](config))
    return DynaBertTrainer(
        models[0],
        make_arguments(**settings),
        stage=stage,
        problem=problem,  # type: ignore[arg-type]
        train_dataset=rows,
        data_collator=DynamicPadCollator(tokenizer),
        teacher=models[1] if stage.teacher else None,
        group_by_length=False,
    )


@pytest.mark.parametrize("teacher", [None, "full"], ids=["labels", "teacher"])
@pytest.mark.parametrize("problem", list(HEADS))
def test_accumulating_3_batches_equals_one(
    problem: Any,
    teacher: Any,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerBase,
    make_arguments: Any,
) -> None:
    # Unequal batches: other numbers of rows, tokens and labels.
    rows = encode_examples(make_data(problem, 13, 4).train, problem, tokenizer, 24)
    collator = DynamicPadCollator(tokenizer)
    cuts = [(0, 2), (2, 9), (9, 13)]
    parts = [collator([rows[i] for i in range(*cut)]) for cut in cuts]
    whole = collator([rows[i] for i in range(13)])
    stage = Stage("s", (FULL, NARROW), teacher, 1.0, 0.5 if teacher else 0.0)
    gradients = []
    for batches in ([whole], parts):
        trainer = trainer_on(problem, rows, tokenizer, make_arguments, stage)
        trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        for index, batch in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
            trainer.training_step(trainer.model, batch)
        model: Any = trainer.model
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    at_once, in_parts = gradients
    assert at_once and at_once.keys() == in_parts.keys()
    for name, gradient in at_once.items():
        torch.testing.assert_close(in_parts[name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_long_sentences_and_contexts_lose_nothing(
    bert: Path, make_data: MakeData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for problem in HEADS:
        data = make_data(problem, 20, 8)
        run = arguments(tmp_path / "run", max_length=8)
        task = PreparedTask(str(bert), data, tokenizer, run)
        assert max(task.validation_rows.lengths) == 8
        assert len(task.validation_rows) > len(data.validation)
        (row,) = task.evaluate(task.load(str(bert), fresh_head=True), [FULL])
        assert row.num_rows == len(data.validation)


@pytest.mark.parametrize(
    ("problem", "model_positions", "asked", "expected"),
    [
        ("classification", 512, None, 128),
        ("question-answering", 512, None, 384),
        ("question-answering", 256, None, 256),
        ("token-classification", 64, None, 64),
        ("question-answering", 512, 200, 200),
    ],
)
def test_default_length_of_a_row(
    problem: Any, model_positions: int, asked: int | None, expected: int
) -> None:
    config = DynaBertConfig(max_position_embeddings=model_positions)
    assert row_length(asked, problem, config) == expected


def test_longer_rows_than_the_model_takes_are_refused(
    bert: Path, make_data: MakeData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run", max_length=25)
    with pytest.raises(ValueError, match="max_length=25, expected at most 24"):
        run_stages(bert, make_data(), tokenizer, run)
    assert not run.output_dir.exists()


def long_text_file(folder: Path) -> Path:
    rows = ["text,label", "great a,1", "awful b,0", f"{'a ' * 30},1", "great c,1"]
    rows += ["awful d,0"] * 8
    (folder / "train.csv").write_text("\n".join(rows))
    return folder / "train.csv"


def test_a_text_longer_than_the_model_is_named(
    bert: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = load_task("file", train_file=long_text_file(tmp_path), seed=1)
    run = arguments(tmp_path / "run", max_length=8)
    with pytest.raises(ValueError, match=r"train\.csv line 4: a text of 32 tokens, expected at m"):
        run_stages(bert, data, tokenizer, run)
    assert not run.output_dir.exists()
    task = PreparedTask(str(bert), data, tokenizer, replace(run, long_texts="cut"))
    assert sum(rows.num_truncated for rows in (task.train_rows, task.importance_rows)) == 1


def test_texts_of_a_task_known_by_name_are_cut(
    bert: Path, make_data: MakeData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = make_data()
    long = data.train[0]._replace(text="a " * 30)
    data = replace(data, train=[long, *data.train[1:]])
    run = arguments(tmp_path / "run", importance_source="dev")
    assert PreparedTask(str(bert), data, tokenizer, run).train_rows.num_truncated == 1
    with pytest.raises(ValueError, match="a text of 32 tokens"):
        PreparedTask(str(bert), data, tokenizer, replace(run, long_texts="error"))


def test_padding_is_no_answer(
    bert: Path, make_data: MakeData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run = arguments(tmp_path / "run", hidden_padding=True)
    with pytest.raises(ValueError, match="hidden_padding=True on task toy-questions"):
        run_stages(bert, make_data("question-answering"), tokenizer, run)
    assert not run.output_dir.exists()


@pytest.mark.parametrize("problem", list(HEADS))
def test_a_model_without_a_head_needs_the_teacher_stage(
    problem: str,
    bert: Path,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    run = arguments(tmp_path / "run", stages=("width",))
    with pytest.raises(ValueError, match="Begin with the teacher stage"):
        run_stages(bert, make_data(problem), tokenizer, run)


def test_labels_in_another_order_are_refused(
    make_model: Any, make_data: MakeData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    make_model(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}).save_pretrained(
        folder
    )
    run = arguments(tmp_path / "run", stages=("width",))
    with pytest.raises(ValueError, match="has the labels good, bad, expected bad, good"):
        run_stages(folder, make_data(), tokenizer, run)
    make_model(num_labels=3).save_pretrained(folder)
    with pytest.raises(ValueError, match="has 3 labels, expected 2 as toy"):
        run_stages(folder, make_data(), tokenizer, run)


def test_rows_must_be_those_of_the_problem(
    make_rows: Any, make_model: Any, collator: Any, make_data: MakeData
) -> None:
    spec: TaskSpec = make_data("question-answering").spec
    with pytest.raises(TypeError, match="dataset=EncodedDataset, expected QuestionRows for ques"):
        evaluate_grid(make_model(), make_rows(4), collator, spec, [FULL])


@pytest.mark.parametrize("problem", list(HEADS))
def test_a_diverged_model_is_not_scored(
    problem: Any,
    bert: Path,
    make_data: MakeData,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    data = make_data(problem, 10, 4)
    task = PreparedTask(str(bert), data, tokenizer, arguments(tmp_path / "run"))
    model = task.load(str(bert), fresh_head=True)
    torch.nn.init.constant_(next(p for n, p in model.named_parameters() if "norm" in n), torch.nan)
    with pytest.raises(ValueError, match=r"subnet w0\.5-d1: .*NaN"):
        task.evaluate(model, [NARROW])


def test_every_problem_with_labels_has_a_model() -> None:
    assert set(MODEL_CLASSES) == set(get_args(Problem)) - {"none"}
