"""``dynabert augment`` on a toy model, word vectors and own files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from dynabert.cli import app
from dynabert.data.tasks import load_task
from dynabert.training.arguments import RunArguments
from dynabert.training.augmentation import read_augmented
from tests.training.augmentation_toys import bert

TEXTS = ("The film was good.", "A great movie!", "nice plot, bad story", "films and planes")


class Place(NamedTuple):
    model: Path
    rows: Path
    vectors: Path


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A masked language model, 40 texts without labels, and word vectors."""
    folder = tmp_path_factory.mktemp("augment")
    model, tokenizer = bert()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = folder / "rows.tsv"
    rows.write_text("text\n" + "".join(f"{TEXTS[i % 4]} {i}\n" for i in range(40)))
    vectors = folder / "vectors.txt"
    vectors.write_text("films 1 0\nmovies 1 .1\nplanes 0 1\nboats .1 1\n")
    return Place(folder / "model", rows, vectors)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["augment", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    line = result.stderr.strip()
    assert line.startswith("dynabert: error: ") and "\n" not in line
    return line


def test_writes_variants_of_the_training_rows(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "aug.jsonl"
    sources = ("--mlm", place.model, "--word-vectors", place.vectors)
    command = ("--task", "file", "--train-file", place.rows, "--out", out, *sources)
    document = tmp_path / "made.json"
    result = run(*command, "--attempts", "4", "--json", document)
    assert result.exit_code == 0, result.stderr
    rows = list(read_augmented(out))
    train = load_task(
        "file", train_file=place.rows, label_column=None, seed=RunArguments.seed
    ).train
    assert len(train) == 36  # of 40; train holds out the same four
    assert [row.text for row in rows if row.attempt == 0] == [example.text for example in train]
    assert max(row.attempt for row in rows) <= 4
    assert any("movies" in row.text or "boats" in row.text for row in rows)
    made = json.loads(document.read_text())
    assert made["rows"] == len(rows) and made["source_rows"] == 36
    assert made["source_rows_per_second"] == pytest.approx(36 / made["seconds"])
    assert result.stdout.startswith(f"{len(rows)} rows from 36, {len(rows) / 36:.1f} each, in ")
    assert result.stdout.endswith(f"They are in {out}.\n")

    again = run(*command, "--attempts", "4", "--batch-tokens", "20")
    assert again.stdout == result.stdout and f"{out} is finished" in again.stderr
    line = refused(*command, "--attempts", "4", "--candidates", "3")
    assert f"{out} was made with another source, expected the same, to go on with it" in line


def test_glue_task_uses_its_number_of_attempts(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "STS-B"
    folder.mkdir()
    lines = ["sentence1\tsentence2\tscore", "The films\tsome planes\t3.5", "planes\tthe films\t1"]
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(lines) + "\n")
    out = tmp_path / "aug.jsonl"
    result = run(
        *("--task", "stsb", "--data-dir", tmp_path, "--out", out),
        *("--word-vectors", place.vectors, "--max-train-rows", "1", "--probability", "0.5"),
    )
    assert result.exit_code == 0, result.stderr
    rows = list(read_augmented(out))
    assert rows[0].attempt == 0 and rows[0].text_pair is not None
    assert json.loads((tmp_path / "aug.jsonl.json").read_text())["parameters"]["attempts"] == 30
    assert {row.line for row in rows} == {rows[0].line}
    assert {row.attempt > 30 for row in rows[1:]} == {False, True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "augment: no source of words, expected --mlm, --word-vectors or --wordnet"),
        (
            ("--mlm", "nowhere/at-all"),
            "model='nowhere/at-all', expected a masked language model with",
        ),
        (("--word-vectors", "none.txt"), "WordVectorSource: path=none.txt, expected an existing"),
        (("--wordnet",), "WordNetSource: nltk with its WordNet data is not installed"),
        (("--word-vectors", "VECTORS", "--attempts", "0"), "attempts=0, expected at least 1"),
        (("--word-vectors", "VECTORS", "--candidates", "0"), "num_candidates=0, expected at least"),
        (("--mlm", "MODEL", "--device", "tpu"), "--device: 'tpu', expected one of cpu"),
        (("--mlm", "MODEL", "--batch-tokens", "0"), "batch_tokens=0, expected at least 1 of each"),
    ],
)
def test_refusals_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)
    named = {"VECTORS": place.vectors, "MODEL": place.model}
    line = refused(
        *("--task", "file", "--train-file", place.rows, "--out", tmp_path / "aug.jsonl"),
        *(named.get(argument, argument) for argument in arguments),
    )
    assert message in line
    assert not list(tmp_path.iterdir())
