"""Training with an augmented file: which stages learn from it, resuming, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynabert import DynaBertForSequenceClassification, DynaBertModel
from dynabert.data.collators import encode
from dynabert.data.examples import Example, TaskData
from dynabert.training import DynaBertTrainer, RunArguments, run_stages
from dynabert.training.augmentation import (
    AugmentationArguments,
    add_augmented,
    read_augmented,
    write_augmented,
)
from tests.training.augmentation_toys import Fixed

MakeData = Callable[..., TaskData]
LETTERS = "bcefghjkln"
SOURCE = Fixed({a: [b for b in LETTERS if b != a] for a in LETTERS})
WIDTHS = {"stages": ("teacher", "width"), "widths": (1.0, 0.5)}


@pytest.fixture
def plain_bert(make_encoder: Callable[..., DynaBertModel], tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    make_encoder(seed=4, hidden_dropout_prob=0.1).save_pretrained(folder)
    return folder


def augmented(folder: Path, data: TaskData, **changes: Any) -> Path:
    """A file of the training rows of `data` and three attempts at each."""
    path = folder / f"aug{len(list(folder.glob('aug*')))}.jsonl"
    examples = [example for example in data.train if isinstance(example, Example)]
    how = AugmentationArguments(attempts=3, **changes)
    return write_augmented(path, examples, SOURCE, how, progress=False).path


def arguments(output_dir: Path, **changes: Any) -> RunArguments:
    settings: dict[str, Any] = {
        "learning_rate": 5e-3,
        "batch_size": 8,
        "max_length": 24,
        "importance_rows": 6,
        "teacher_epochs": 1,
        "width_epochs": 1,
        "final_epochs": 1,
        "bf16": False,
        "use_cpu": True,
        "save_steps": 3,
        "progress": False,
    }
    return RunArguments(output_dir, **{**settings, **WIDTHS, **changes})


def record(run_dir: Path, stage: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir / stage / "stage.json").read_text())
    return document


def test_stages_with_a_teacher_learn_from_the_file(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data(num_val=8)
    path = augmented(tmp_path, data)
    run_dir = tmp_path / "run"
    stages = ("teacher", "width", "final")
    run_stages(plain_bert, data, tokenizer, arguments(run_dir, stages=stages, augmented_file=path))
    known = {example[:2] for example in (*data.train, *data.validation)}
    extra = sum(row[:2] not in known for row in read_augmented(path))
    assert extra > 100
    num_train = 64 - 6
    steps = {stage: record(run_dir, stage)["steps"] for stage in stages}
    alone = math.ceil(num_train / 8)
    assert steps == {
        "teacher": alone,
        "width": math.ceil((num_train + extra) / 8),
        "final": alone,
    }


def test_rows_of_the_task_are_left_out_and_labels_dropped(
    make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data(num_train=9, num_val=5)
    path = tmp_path / "own.jsonl"
    texts = [data.validation[0].text, data.train[3].text, "b c e", data.train[1].text, "k"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = encode(data.train[:7], tokenizer, 24)
    joined = add_augmented(rows, path, data, tokenizer, 24)
    own = encode([Example("b c e", None, None), Example("k", None, None)], tokenizer, 24)
    expected = [rows[i] for i in range(7)] + [own[i] for i in range(2)]
    for row in expected:
        row.pop("labels", None)
    assert [joined[i] for i in range(len(joined))] == expected
    assert joined.lengths == [row["length"] for row in expected]
    assert rows[0]["labels"] == data.train[0].label


def test_texts_without_labels_are_augmented_too(
    plain_bert: Path,
    make_data: MakeData,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    data = make_data("none")
    path = augmented(tmp_path, data)
    run = arguments(tmp_path / "run", stages=("width",), augmented_file=path)
    run_stages(plain_bert, data, tokenizer, run)
    assert record(run.output_dir, "width")["steps"] > 2 * math.ceil(64 / 8)


class Interruption(Exception):
    """Stands for whatever ends the process."""


def test_an_interrupted_stage_goes_on_with_a_moved_file(
    plain_bert: Path,
    make_data: MakeData,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_data(num_train=24, num_val=8)
    path = augmented(tmp_path, data)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_stages(plain_bert, data, tokenizer, arguments(whole, augmented_file=path))

    training_step = DynaBertTrainer.training_step

    def interrupted(self: DynaBertTrainer, *args: Any, **kwargs: Any) -> Any:
        if self._stage.name == "width" and self.state.global_step == 7:
            raise Interruption
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DynaBertTrainer, "training_step", interrupted)
        with pytest.raises(Interruption):
            run_stages(plain_bert, data, tokenizer, arguments(parts, augmented_file=path))

    other = augmented(tmp_path, data, seed=1)
    for wrong in (None, other):
        with pytest.raises(ValueError, match="holds a run with another augmented_file, expected"):
            run_stages(plain_bert, data, tokenizer, arguments(parts, augmented_file=wrong))
    moved = path.rename(tmp_path / "moved.jsonl")
    run_stages(plain_bert, data, tokenizer, arguments(parts, augmented_file=moved))
    assert record(parts, "width")["resumed_from"] == "checkpoint-6"
    first, second = (
        DynaBertForSequenceClassification.from_pretrained(folder / "model").state_dict()
        for folder in (whole, parts)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_file_can_be_added_after_the_teacher_stage(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data(num_train=24, num_val=8)
    run_dir = tmp_path / "run"
    run_stages(plain_bert, data, tokenizer, arguments(run_dir, stages=("teacher",)))
    path = augmented(tmp_path, data)
    run_stages(plain_bert, data, tokenizer, arguments(run_dir, augmented_file=path))
    assert record(run_dir, "width")["steps"] > 2 * record(run_dir, "teacher")["steps"]
    with pytest.raises(ValueError, match="another augmented_file"):
        run_stages(plain_bert, data, tokenizer, arguments(run_dir))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"read_augmented: path=.*aug.jsonl, expected an existing file"),
        ('{"text": "b"}\n{"text": 3}\n', "line 2: text=3, expected text"),
        ('{"text": "b", "text_pair": "c"}\n', "line 1 holds a pair, expected one text as task toy"),
        ("OWN ROW", "holds nothing but rows of task toy, expected variants of them"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_written(
    content: str | None,
    message: str,
    plain_bert: Path,
    make_data: MakeData,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    data = make_data()
    path = tmp_path / "aug.jsonl"
    if content is not None:
        path.write_text(content.replace("OWN ROW", json.dumps({"text": data.train[0].text})))
    error = FileNotFoundError if content is None else ValueError
    run = arguments(tmp_path / "run", augmented_file=path)
    with pytest.raises(error, match=message):
        run_stages(plain_bert, data, tokenizer, run)
    assert not run.output_dir.exists()


def test_a_task_of_pairs_needs_pairs(make_data: MakeData, tokenizer: Any, tmp_path: Path) -> None:
    data = make_data()
    data = replace(data, spec=replace(data.spec, text_fields=("first", "second")))
    path = tmp_path / "aug.jsonl"
    path.write_text('{"text": "b"}\n')
    rows = encode([Example("b", "c", 1)], tokenizer, 24)
    with pytest.raises(ValueError, match="line 1 holds one text, expected a pair as task toy has"):
        add_augmented(rows, path, data, tokenizer, 24)
    path.write_text('{"text": "b", "text_pair": "e"}\n')
    assert len(add_augmented(rows, path, data, tokenizer, 24)) == 2


def test_uses_that_make_no_sense_are_refused(
    plain_bert: Path, make_data: MakeData, tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data()
    path = augmented(tmp_path, data)
    run = arguments(tmp_path / "run", augmented_file=path, distillation=False)
    with pytest.raises(
        ValueError, match=r"with distillation=False, expected None\. Its rows have no"
    ):
        run_stages(plain_bert, data, tokenizer, run)
    assert not run.output_dir.exists()
    rows = encode(data.train, tokenizer, 24)
    tagging = replace(data, spec=replace(data.spec, problem="token-classification"))
    with pytest.raises(ValueError, match="augment: task toy is token-classification, expected one"):
        add_augmented(rows, path, tagging, tokenizer, 24)
