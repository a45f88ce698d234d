"""``dynabert evaluate --dtype``: the grid in another element type, beside the one in float32."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer
from typer.testing import CliRunner

from dynabert import DynaBertConfig, DynaBertForSequenceClassification, SubnetConfig
from dynabert.cli import app
from dynabert.report import GridReport

WORDS = ("the", "was", "in", "anna", "paris", "who", "where")
TEXTS = [f"the {a} was in {b}" for a in WORDS for b in WORDS]
SCORES = np.random.default_rng(0).random(len(TEXTS)).round(3)
NARROW = SubnetConfig(0.5, 0.5)
TOLD = "No float32 scores of these subnets on these rows are saved in RUN"


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A regression of two layers with two heads, its tokeniser, and texts with scores."""
    folder = tmp_path / "model"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    config = DynaBertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.3,
        num_labels=1,
    )
    DynaBertForSequenceClassification(config).save_pretrained(folder)
    rows = [f"{text},{score}\n" for text, score in zip(TEXTS, SCORES, strict=True)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows))
    return folder


def evaluate(model_dir: Path, *options: str, rows: str = "rows.csv") -> Any:
    command = ["evaluate", str(model_dir), "--task", "file", "--device", "cpu"]
    command += ["--validation-file", str(model_dir.parent / rows), "--batch-size", "16"]
    result = CliRunner().invoke(app, [*command, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def pearson(model_dir: Path, dtype: str, subnet: SubnetConfig) -> float:
    """The score, from the model alone and one text after the other."""
    model = DynaBertForSequenceClassification.from_pretrained(model_dir).eval()
    if dtype == "int8":
        model.quantize("int8")
    else:
        model.to(getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with torch.no_grad():
        logits = [
            model(**tokenizer(text, return_tensors="pt"), subnet=subnet).logits.item()
            for text in TEXTS
        ]
    return float(np.corrcoef(logits, SCORES)[0, 1])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("dtype", ["int8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_grid_of_another_dtype_stands_beside_the_one_in_float32(
    model_dir: Path, dtype: str
) -> None:
    assert evaluate(model_dir).exit_code == 0
    before = files(model_dir)
    target = model_dir.parent / "out.json"
    outcome = evaluate(model_dir, "--dtype", dtype, "--json", str(target))
    assert outcome.exit_code == 0
    after = files(model_dir)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"grid-{dtype}.json"}

    document = json.loads(target.read_text())
    assert document == json.loads(after[f"grid-{dtype}.json"])
    assert document["dtype"] == dtype
    rows = {row.subnet: row for row in GridReport.from_json(document).rows}
    saved = {row.subnet: row for row in GridReport.load(model_dir / "grid.json").rows}
    for grid, computed_in in ((rows, dtype), (saved, "float32")):
        expected = pearson(model_dir, computed_in, NARROW)
        assert grid[NARROW].metrics["pearson"] == pytest.approx(expected, abs=1e-5)
    scores = {subnet.name: row.primary for subnet, row in rows.items()}
    exact = {subnet.name: row.primary for subnet, row in saved.items()}
    assert len(scores) == 4
    differences = []
    for row in document["float32"]:
        name = row["subnet"]
        assert (row["saved"], row["score"]) == (exact[name], scores[name])
        assert row["difference"] == pytest.approx(scores[name] - exact[name])
        assert f"{exact[name]:9.4f} {scores[name]:9.4f}{row['difference']:+12.4f}" in outcome.stdout
        differences.append(row["difference"])
    assert all(0 < abs(difference) < 0.05 for difference in differences)
    assert f"{sum(differences) / 4:+.4f} on average" in outcome.stdout


def test_without_a_grid_nothing_is_compared_and_nothing_saved_if_asked(model_dir: Path) -> None:
    before = files(model_dir)
    outcome = evaluate(model_dir, "--dtype", "int8", "--no-save")
    assert TOLD in outcome.stdout
    assert files(model_dir) == before


@pytest.mark.slow
def test_a_grid_of_other_rows_is_not_compared_with(model_dir: Path) -> None:
    text = (model_dir.parent / "rows.csv").read_text().splitlines(keepends=True)
    (model_dir.parent / "fewer.csv").write_text("".join(text[:-3]))
    assert evaluate(model_dir, rows="fewer.csv").exit_code == 0
    assert TOLD in evaluate(model_dir, "--dtype", "int8").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int4"), "--dtype: 'int4', expected one of float32, bfloat16, float16, int8"),
        (("--dtype", "int8", "--bf16"), "--bf16 with --dtype int8, expected one of them"),
    ],
    ids=["unknown", "autocast"],
)
def test_refused(model_dir: Path, options: tuple[str, ...], message: str) -> None:
    before = files(model_dir)
    outcome = evaluate(model_dir, *options)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert files(model_dir) == before
