"""``dynabert train`` and ``evaluate`` on tagged words and on questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer
from typer.testing import CliRunner

from dynabert.cli import app
from dynabert.report import GridReport

WORDS = ("the", "was", "in", "anna", "paris", "who", "where")
CONLL = "the O\nwas O\n\nanna B-PER\nwas O\nin O\nparis B-LOC\n\n" * 4


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A BERT of two layers with two heads, and its tokeniser."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ""])
    )
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def squad(number: int = 6, answer: str = "paris", start: int = 12) -> str:
    answers = [{"text": answer, "answer_start": start}]
    paragraphs = [
        {
            "context": f"anna was in paris {'in ' * index}",
            "qas": [{"id": f"q{index}", "question": "where was anna", "answers": answers}],
        }
        for index in range(number)
    ]
    return json.dumps({"data": [{"paragraphs": paragraphs}]})


def run(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def train(model: Path, *options: str | Path) -> Any:
    folder = model.parent
    return run(
        *("train", "--model", model, "--output-dir", folder / "run", "--data-dir", folder),
        *("--stages", "teacher,width", "--depths", "1", "--epochs", "1", "--threads", "1"),
        *options,
    )


TAGGING = ("--task", "file", "--problem", "token-classification", "--train-file", "train.conll")
ASKING = ("--task", "file", "--problem", "question-answering", "--train-file", "train.json")


@pytest.mark.parametrize(
    ("options", "files", "metrics", "num_rows"),
    [
        (TAGGING, {"train.conll": CONLL, "dev.conll": CONLL}, ["f1", "precision", "recall"], 8),
        (ASKING, {"train.json": squad(), "dev.json": squad(3)}, ["f1", "exact_match"], 3),
        (
            ("--task", "squad"),
            {"train-v1.1.json": squad(), "dev-v1.1.json": squad(3)},
            ["f1", "exact_match"],
            3,
        ),
    ],
    ids=["conll", "own-questions", "squad"],
)
def test_evaluate_repeats_the_grid_of_train(
    options: tuple[str, ...], files: dict[str, str], metrics: list[str], num_rows: int, model: Path
) -> None:
    for name, text in files.items():
        (model.parent / name).write_text(text)
    validation = list(files)[1]
    own = () if "squad" in options else ("--validation-file", validation)
    assert train(model, *options, *own).exit_code == 0
    grid = model.parent / "run" / "grid.json"
    report = GridReport.load(grid)
    assert list(report.rows[0].metrics) == metrics
    assert {row.num_rows for row in report.rows} == {num_rows}
    (model.parent / "run" / "grid.md").unlink()

    outcome = run("evaluate", model.parent / "run", "--data-dir", model.parent, *own)
    assert outcome.exit_code == 0
    assert f"f1 (%) on {num_rows} rows" in outcome.stdout
    assert f"{metrics[-1]} (%)" in outcome.stdout
    again = GridReport.load(grid)
    for row, former in zip(again.rows, report.rows, strict=True):
        assert row.metrics == pytest.approx(former.metrics)
    assert f"{metrics[-1]} (%)" in (model.parent / "run" / "grid.md").read_text()


@pytest.mark.parametrize(
    ("options", "files", "message"),
    [
        (
            TAGGING,
            {"train.conll": CONLL + "anna\n"},
            r"train.conll line 33: 1 columns, expected 2.",
        ),
        (ASKING, {"train.json": squad(answer="rome")}, "train.json question q0: answer 'rome' is"),
        (ASKING, {"train.json": squad()[:-9]}, "train.json line 1: not valid JSON"),
        (
            ("--task", "squad"),
            {"train-v1.1.json": "{}", "dev-v1.1.json": squad()},
            "train-v1.1.json document: data=None, expected a list.",
        ),
        (
            ("--task", "file", "--train-file", "long.csv"),
            {"long.csv": f"text,label\nanna,1\n{'in ' * 40},0\n" + "anna,1\n" * 9},
            "long.csv line 3: a text of 42 tokens, expected at most 24",
        ),
    ],
    ids=["too-few-columns", "wrong-answer", "cut-off", "no-squad", "long-text"],
)
def test_bad_data_is_refused_in_a_line(
    options: tuple[str, ...], files: dict[str, str], message: str, model: Path
) -> None:
    for name, text in files.items():
        (model.parent / name).write_text(text)
    outcome = train(model, *options)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("dynabert: error: ")
    assert message in line
    assert not (model.parent / "run").exists()


def test_a_model_is_scored_on_tasks_of_its_kind_only(model: Path) -> None:
    (model.parent / "train.conll").write_text(CONLL)
    (model.parent / "dev-v1.1.json").write_text(squad())
    assert train(model, *TAGGING).exit_code == 0
    place = model.parent / "run"
    outcome = run("evaluate", place, "--task", "squad", "--data-dir", model.parent)
    assert outcome.exit_code == 2
    assert "squad is question-answering, expected a task for DynaBertForTokenClas" in outcome.stderr
