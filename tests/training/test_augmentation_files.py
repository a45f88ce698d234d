"""Augmented rows on disk: the same bytes whatever interrupts, and files that are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynabert.data.examples import Example
from dynabert.training.augmentation import (
    AugmentationArguments,
    CandidateSource,
    MaskedLMSource,
    Word,
    augmented_rows,
    files,
    read_augmented,
    write_augmented,
)
from tests.training.augmentation_toys import Fixed, bert

KNOWN = {"film": ["movie", "picture"], "good": ["fine", "great"], "plot": ["story\u2028line"]}
ARGUMENTS = AugmentationArguments(attempts=5)
SENTENCES = ["A good film.", "the café", "Plot, plot and\nfilm", "good GOOD", "no words here: 10"]
EXAMPLES = [Example(SENTENCES[i % 5], None, i % 2, i + 2) for i in range(23)]
PAIRS = [Example(SENTENCES[i % 5], SENTENCES[i % 3], None, i + 1) for i in range(11)]


class Interruption(Exception):
    """Stands for whatever ends the process."""


class Failing(Fixed):
    """Stops at a call."""

    def __init__(self, at_call: int) -> None:
        super().__init__(KNOWN)
        self.at_call = at_call

    def candidates(self, words: Sequence[Word]) -> list[list[str]]:
        if self.num_calls == self.at_call:
            raise Interruption
        return super().candidates(words)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PART_ROWS", 4)


def write(path: Path, source: CandidateSource | None = None, **changes: Any) -> files.AugmentedFile:
    examples = changes.pop("examples", EXAMPLES)
    arguments = replace(ARGUMENTS, **changes)
    return write_augmented(path, examples, source or Fixed(KNOWN), arguments, progress=False)


@pytest.mark.parametrize("examples", [EXAMPLES, PAIRS], ids=["single", "pairs"])
def test_file_holds_the_rows_of_all_examples(examples: list[Example], tmp_path: Path) -> None:
    made = write(tmp_path / "new" / "aug.jsonl", examples=examples)
    rows = augmented_rows(examples, Fixed(KNOWN), ARGUMENTS)
    assert list(read_augmented(made.path)) == rows
    assert (made.num_examples, made.num_rows) == (len(examples), len(rows))
    assert made.seconds > 0
    first = json.loads(made.path.read_text().split("\n")[0])
    assert list(first) == [
        name for name in ("text", "text_pair", "line", "attempt") if name in first
    ]
    assert ("text_pair" in first) == (examples is PAIRS)
    assert {path.name for path in made.path.parent.iterdir()} == {"aug.jsonl", "aug.jsonl.json"}


@pytest.mark.parametrize("part_rows", [1, 7, 100])
def test_bytes_do_not_depend_on_the_parts(
    part_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path / "whole.jsonl").path.read_bytes()
    monkeypatch.setattr(files, "_PART_ROWS", part_rows)
    assert write(tmp_path / "parts.jsonl").path.read_bytes() == whole


def test_masked_language_model_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for batch_tokens, part_rows in ((1, 4), (64, 1), (10**6, 100)):
        monkeypatch.setattr(files, "_PART_ROWS", part_rows)
        source = MaskedLMSource(*bert(), batch_tokens=batch_tokens, num_candidates=3)
        path = tmp_path / f"{batch_tokens}.jsonl"
        written.append(write(path, source).path.read_bytes())
    assert written == [written[0]] * 3
    assert written[0].count(b"\n") > len(EXAMPLES)


@pytest.mark.parametrize("at_call", [0, 1, 3, 5])
@pytest.mark.parametrize("torn", [b"", b'{"text": "a half', b'{"text": "whole", "line": 9}\n' * 3])
def test_interrupted_file_goes_on_to_the_same_bytes(
    at_call: int, torn: bytes, tmp_path: Path
) -> None:
    whole = write(tmp_path / "whole.jsonl").path.read_bytes()
    path = tmp_path / "aug.jsonl"
    with pytest.raises(Interruption):
        write(path, Failing(at_call))
    assert not path.exists()
    part = tmp_path / "aug.jsonl.part"
    # What a killed process had written of the next part, but not recorded.
    part.write_bytes(part.read_bytes() + torn)
    source = Fixed(KNOWN)
    made = write(path, source)
    assert path.read_bytes() == whole and not part.exists()
    assert made.num_rows == whole.count(b"\n")
    assert source.num_calls == 6 - at_call  # what was finished is not made again


def test_part_that_lost_rows_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write(tmp_path / "whole.jsonl").path.read_bytes()
    with pytest.raises(Interruption):
        write(tmp_path / "aug.jsonl", Failing(3))
    part = tmp_path / "aug.jsonl.part"
    part.write_bytes(part.read_bytes()[:-1])
    assert write(tmp_path / "aug.jsonl").path.read_bytes() == whole
    assert "aug.jsonl.part is shorter than recorded; it is made anew" in caplog.text


def test_finished_file_is_only_reported(tmp_path: Path) -> None:
    made = write(tmp_path / "aug.jsonl")
    source = Fixed(KNOWN)
    assert write(made.path, source) == made
    assert source.num_calls == 0


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"attempts": 6, "probability": 0.5}, "attempts, probability"),
        ({"keep_original": False}, "keep_original"),
        ({"stop_words": frozenset({"a"})}, "stop_words"),
        ({"examples": EXAMPLES[1:]}, "data"),
        ({"examples": [EXAMPLES[0]._replace(text="Other."), *EXAMPLES[1:]]}, "data"),
        ({"source": Fixed({"film": ["movie"]})}, "source"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_parameters_are_refused(
    finished: bool, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "aug.jsonl"
    if finished:
        write(path)
    else:
        with pytest.raises(Interruption):
            write(path, Failing(2))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    name = "aug.jsonl" if finished else "aug.jsonl.part"
    with pytest.raises(ValueError, match=f"{name} was made with another {named}, expected the sam"):
        write(path, **changes)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_labels_are_no_parameter(tmp_path: Path) -> None:
    made = write(tmp_path / "aug.jsonl")
    assert write(made.path, examples=[e._replace(label=None) for e in EXAMPLES]) == made


def test_removed_file_is_made_anew_with_any_parameters(tmp_path: Path) -> None:
    path = write(tmp_path / "aug.jsonl").path
    path.unlink()
    assert {row.attempt for row in read_augmented(write(path, keep_original=False).path)} >= {1}


def test_files_from_elsewhere_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "aug.jsonl"
    path.write_text("mine")
    with pytest.raises(
        ValueError, match=r"aug.jsonl exists without aug.jsonl.json, expected a fil"
    ):
        write(path)
    assert path.read_text() == "mine"
    path.unlink()
    write(path)
    with path.open("a") as stream:
        stream.write('{"text": "mine"}\n')
    with pytest.raises(
        ValueError, match=r"aug.jsonl is not as aug.jsonl.json says, expected it un"
    ):
        write(path)


def test_arguments_that_give_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path=.*aug.txt, expected a name that ends in .jsonl"):
        write(tmp_path / "aug.txt")
    with pytest.raises(ValueError, match=r"examples=\[\], expected at least one"):
        write(tmp_path / "aug.jsonl", examples=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nb\n', "line 2: not valid JSON"),
        ('{"text": "a"}\n\n', "line 2: not valid JSON"),
        ('["a"]\n', "line 1: a JSON list, expected an object"),
        ('{"text": " "}\n', "line 1: text=' ', expected text"),
        ('{"sentence": "a"}\n', "line 1: text=None, expected text"),
        ('{"text": "a", "text_pair": 1}\n', "line 1: text_pair=1, expected text"),
        ('{"text": "a", "line": "1"}\n', "line 1: line='1', expected a whole number"),
        ('{"text": "a"}\n{"text": "a", "text_pair": "b"}\n', "line 2: a text_pair, unlike the lin"),
        ('{"text": "a", "text_pair": "b"}\n{"text": "a"}\n', "line 2: no text_pair, unlike the l"),
        ('{"text": "\udcff"}\n', "line 1: not valid JSON .*utf-8"),
        ("", "is empty, expected at least one row"),
    ],
)
def test_malformed_files_are_refused_by_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "aug.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"aug.jsonl {message}"):
        list(read_augmented(path))


def test_rows_need_a_text_only(tmp_path: Path) -> None:
    path = tmp_path / "aug.jsonl"
    path.write_text('{"text": "a", "score": 3}\n{"text": "b", "line": 4}')
    assert list(read_augmented(path)) == [("a", None, 0, 0), ("b", None, 4, 0)]
    with pytest.raises(FileNotFoundError, match=r"read_augmented: path=.*none.jsonl, expected an"):
        list(read_augmented(tmp_path / "none.jsonl"))
