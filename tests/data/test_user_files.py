"""Own CSV, TSV and JSONL files through `load_task`."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynabert.data.tasks import Example, TaskData, load_task


def load(
    folder: Path, train: str, validation: str, suffix: str = "csv", **options: Any
) -> TaskData:
    (folder / f"train.{suffix}").write_text(train, encoding="utf-8")
    (folder / f"valid.{suffix}").write_text(validation, encoding="utf-8")
    return load_task(
        "file",
        folder,
        train_file=f"train.{suffix}",
        validation_file=f"valid.{suffix}",
        **options,
    )


def test_string_labels_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    data = load(tmp_path, "text,label\na,spam\nb,ham\nc,spam\n", "text,label\nd,ham\n")
    assert data.spec.problem == "classification"
    assert data.spec.label_names == ("ham", "spam")
    assert [example.label for example in data.train] == [1, 0, 1]
    assert data.validation == [Example("d", None, 0, 2)]
    assert (data.spec.metrics, data.spec.primary_metric) == (("accuracy", "f1_macro"), "accuracy")


def test_whole_numbers_are_classes_in_numerical_order(tmp_path: Path) -> None:
    data = load(tmp_path, "text,label\na,10\nb,9\nc,-1\n", "text,label\nd,9\n")
    assert data.spec.label_names == ("-1", "9", "10")
    assert [example.label for example in data.train] == [2, 1, 0]


def test_fractions_are_scores(tmp_path: Path) -> None:
    data = load(tmp_path, "text,label\na,1\nb,0.5\n", "text,label\nd,2\n")
    assert data.spec.problem == "regression"
    assert [example.label for example in data.train] == [1.0, 0.5]
    assert isinstance(data.validation[0].label, float)
    assert data.spec.primary_metric == "spearman"


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [("regression", (3, 1), [3.0, 1.0]), ("classification", (0.5, 0.25), [1, 0])],
)
def test_problem_can_be_forced(
    tmp_path: Path, problem: str, labels: tuple[float, ...], expected: list[float]
) -> None:
    rows = "text,label\n" + "".join(f"t,{label}\n" for label in labels)
    data = load(tmp_path, rows, rows, problem=problem)
    assert [example.label for example in data.train] == expected


def test_jsonl_pairs_and_own_column_names(tmp_path: Path) -> None:
    rows = "\n".join(
        json.dumps({"q": f"Q{row}", "a": "A", "gold": gold, "more": None})
        for row, gold in enumerate([True, False])
    )
    columns = {"text_column": "q", "pair_column": "a", "label_column": "gold"}
    data = load(tmp_path, rows, rows, "jsonl", **columns)
    assert data.spec.text_fields == ("q", "a")
    assert data.spec.label_names == ("false", "true")
    assert data.train == [Example("Q0", "A", 1, 1), Example("Q1", "A", 0, 2)]


def test_no_label_column_gives_a_task_without_labels(tmp_path: Path) -> None:
    data = load(tmp_path, "text\na\n", "text\nb\n", "tsv", label_column=None)
    assert data.spec.problem == "none"
    assert data.train == [Example("a", None, None, 2)]
    assert (data.spec.metrics, data.spec.primary_metric) == ((), "")


def test_tenth_is_held_out_without_a_validation_file(tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"t{row},{row % 2}\n" for row in range(30))
    (tmp_path / "train.csv").write_text(rows)
    data = load_task("file", tmp_path, train_file="train.csv")
    assert (len(data.train), len(data.validation)) == (27, 3)
    assert not set(data.train) & set(data.validation)
    assert data.source.endswith("train.csv (3 rows held out for validation)")


def test_validation_alone_takes_the_classes_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "valid.csv").write_text("text,label\na,ham\n")
    options: dict[str, Any] = {"validation_file": "valid.csv", "with_train": False}
    data = load_task("file", tmp_path, label_names=("spam", "ham"), **options)
    assert data.train == []
    assert data.validation == [Example("a", None, 1, 2)]
    with pytest.raises(ValueError, match="label_names=None with with_train=False"):
        load_task("file", tmp_path, **options)


GOOD = "text,label\nok,a\nok,b\n"
SCORES = "text,label\nok,0.5\nok,1.5\n"


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (GOOD, "text,label\nok,a\nok,c\n", r"valid\.csv line 3: label 'c', expected one of a, b"),
        (SCORES, "text,label\nok,nan\n", r"valid\.csv line 2: label 'nan', expected a finite"),
        ("text,label\nok,0.5\nok,nan\n", SCORES, r"train\.csv line 3: label 'nan', expected a fin"),
        (SCORES, "text,label\nok,high\n", r"valid\.csv line 2: label 'high', expected a finite"),
        ("text,label\nok,a\n  ,b\n", GOOD, r"train\.csv line 3: text='  ', expected text"),
        ("text,label\nok,a\nok,\n", GOOD, r"train\.csv line 3: label='', expected a class"),
        ("sentence,label\nok,a\n", GOOD, r"train\.csv line 2: no column 'text' among \['sentence"),
        ("text,label\nok,a\nok,a\n", GOOD, r"classes \['a'\], expected at least two"),
    ],
    ids=[
        "unseen-class",
        "nan-score",
        "nan-train-score",
        "score-no-number",
        "no-text",
        "no-label",
        "no-column",
        "one-class",
    ],
)
def test_bad_row_names_file_and_line(
    tmp_path: Path, train: str, validation: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train, validation)


@pytest.mark.parametrize(
    "row", ['{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": null}']
)
def test_bad_json_row_names_file_and_line(tmp_path: Path, row: str) -> None:
    good = '{"text": "a", "label": 0}'
    with pytest.raises(ValueError, match=r"train\.jsonl line 2: "):
        load(tmp_path, f"{good}\n{row}\n", good, "jsonl")
