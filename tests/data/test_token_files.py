"""Own files of tagged words through `load_task`."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynabert.data.examples import TaggedSentence
from dynabert.data.tasks import TaskData, load_task

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
NAMES = ("O", "B-ORG", "B-PER", "I-PER")
SENTENCES = [
    TaggedSentence(("EU", "rejects"), (1, 0), 3),
    TaggedSentence(("Peter", "Blackburn"), (2, 3), 6),
]


def load(
    folder: Path, train: str, validation: str, suffix: str = "conll", **options: Any
) -> TaskData:
    (folder / f"train.{suffix}").write_text(train, encoding="utf-8")
    (folder / f"valid.{suffix}").write_text(validation, encoding="utf-8")
    return load_task(
        "file",
        folder,
        train_file=f"train.{suffix}",
        validation_file=f"valid.{suffix}",
        problem="token-classification",
        **options,
    )


def test_words_and_tags_are_the_first_and_last_column(tmp_path: Path) -> None:
    data = load(tmp_path, CONLL, CONLL.rstrip("\n"))
    assert data.train == data.validation == SENTENCES
    assert data.spec.problem == "token-classification"
    assert (data.spec.label_names, data.spec.num_labels) == (NAMES, 4)
    assert data.spec.metrics == ("f1", "precision", "recall")
    assert data.spec.primary_metric == "f1"
    assert data.validation_file == tmp_path / "valid.conll"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ([("\n", "\r\n")], "Peter"),
        ([(" ", "\t")], "Peter"),
        ([(" ", "   ")], "Peter"),
        ([(" ", "\t"), ("Peter", "Peter Paul ")], "Peter Paul"),
        ([("\n\n", "\n \t\n\n\n")], "Peter"),
        ([("Peter", "P\u00a0ter")], "P\u00a0ter"),
    ],
    ids=["crlf", "tabs", "several-blanks", "blank-in-a-word", "blank-lines", "no-break-space"],
)
def test_separators(tmp_path: Path, changes: list[tuple[str, str]], word: str) -> None:
    text = CONLL.partition("\n")[2]
    for change in changes:
        text = text.replace(*change)
    found = [item[:2] for item in load(tmp_path, text, text).train]
    assert found == [(("EU", "rejects"), (1, 0)), ((word, "Blackburn"), (2, 3))]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    text = CONLL.partition("\n")[2]
    data = load(tmp_path, text, text, text_column="1", label_column="2")
    assert data.spec.label_names == ("NNP", "VBZ")
    assert data.spec.metrics == ("accuracy", "f1_macro")  # parts of speech are no entities
    fingerprints = {
        load(tmp_path, text, text, text_column=words, label_column=tags).fingerprint
        for words in ("text", "2")
        for tags in ("label", "2")
    }
    assert len(fingerprints | {data.fingerprint}) == 5


def test_json_lists(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "words": ["EU", "rejects"], "ner": ["B-ORG", "O"]},
        {"words": ["Peter", "Blackburn"], "ner": ["B-PER", "I-PER"]},
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    data = load(tmp_path, text, text, "jsonl", text_column="words", label_column="ner")
    assert data.train == [s._replace(line=line) for line, s in enumerate(SENTENCES, start=1)]
    text = text.replace("words", "tokens").replace("ner", "tags")
    assert load(tmp_path, text, text, "jsonl").train == data.train


def test_tags_can_be_those_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "valid.conll").write_text("Rome I-LOC\n")
    options: dict[str, Any] = {"problem": "token-classification", "with_train": False}
    names = ("I-LOC", "O", "I-PER")
    data = load_task("file", tmp_path, validation_file="valid.conll", label_names=names, **options)
    assert data.spec.label_names == names
    assert data.validation == [TaggedSentence(("Rome",), (0,), 1)]
    with pytest.raises(ValueError, match="label_names=None with with_train=False"):
        load_task("file", tmp_path, validation_file="valid.conll", **options)


def test_sentences_are_held_out_without_a_validation_file(tmp_path: Path) -> None:
    text = "".join(f"word{n} {'B-X' if n % 2 else 'O'}\n\n" for n in range(30))
    (tmp_path / "train.conll").write_text(text)
    data = load_task("file", tmp_path, train_file="train.conll", problem="token-classification")
    assert (len(data.train), len(data.validation)) == (27, 3)
    assert data.validation_file == tmp_path / "train.conll"


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (CONLL, "Rome B-LOC\n", r"valid\.conll line 1: tag 'B-LOC', expected one of O, B-ORG"),
        ("a O\nb\n", CONLL, r"train\.conll line 2: 1 columns, expected 2"),
        ("a x O\nb O\n", CONLL, r"train\.conll line 2: 2 columns, expected 3"),
        ("a\tO\nb\t\n", CONLL, r"train\.conll line 2: 1 columns, expected 2"),
        ("a\tO\n\tO\n", CONLL, r"train\.conll line 2: word '' with tag 'O', expected both"),
        ("a\nb\n", CONLL, r"train\.conll line 1: 1 columns, expected 2"),
        ("a O\n\nb B_PER\n", CONLL, r"train\.conll line 3: tag 'B_PER' beside 'O', expected O or"),
        ("a O\n\nb O\n", CONLL, r"the tags are \['O'\], expected at least two"),
        ("", CONLL, r"train\.conll is empty, expected at least one sentence"),
        ("-DOCSTART- O\n\n", CONLL, r"train\.conll is empty"),
    ],
    ids=[
        "unseen-tag",
        "no-tag",
        "fewer-columns",
        "empty-tag",
        "empty-word",
        "one-column",
        "bad-tag",
        "one-tag",
        "empty",
        "only-docstart",
    ],
)
def test_bad_line_names_file_and_line(
    tmp_path: Path, train: str, validation: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train, validation)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"tokens": ["a"]}', r"no key 'tags' among \['tokens'\]"),
        ('{"tokens": "a", "tags": ["O"]}', r"tokens='a', expected a list of texts"),
        ('{"tokens": [], "tags": []}', r"tokens=\[\], expected a list"),
        ('{"tokens": ["a", ""], "tags": ["O", "O"]}', r"tokens\[1\]='', expected text"),
        ('{"tokens": ["a"], "tags": [0]}', r"tags\[0\]=0, expected text"),
        ('{"tokens": ["a"], "tags": ["O", "O"]}', r"2 tags for 1 tokens, expected as many"),
        ('{"tokens": ["a"], ', r"not valid JSON"),
    ],
    ids=["no-key", "no-list", "empty", "no-word", "number", "lengths", "cut-off"],
)
def test_bad_json_row_names_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    good = '{"tokens": ["a", "b"], "tags": ["O", "B-X"]}'
    with pytest.raises(ValueError, match=r"train\.jsonl line 2: " + message):
        load(tmp_path, f"{good}\n{row}\n", good, "jsonl")


def test_bad_files_are_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"problem": "token-classification"}
    with pytest.raises(FileNotFoundError, match=r"nowhere\.conll"):
        load_task("file", tmp_path, train_file="nowhere.conll", **options)
    (tmp_path / "train.conll").write_bytes(b"a O\nb\xff B-X\n")
    with pytest.raises(ValueError, match=r"train\.conll line 2: byte 0xff at offset 5"):
        load_task("file", tmp_path, train_file="train.conll", **options)
    (tmp_path / "train.conll").write_text(CONLL)
    for column in ("ner", "0"):
        with pytest.raises(ValueError, match=f"column '{column}', expected a number, from 1"):
            load_task("file", tmp_path, train_file="train.conll", label_column=column, **options)
    with pytest.raises(ValueError, match=r"line 3: 4 columns, expected 9"):
        load_task("file", tmp_path, train_file="train.conll", label_column="9", **options)
