"""GLUE: the real files where present, hand-made ones in each layout, and a stand-in hub."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynabert.data.glue import GLUE_TASKS
from dynabert.data.tasks import Example, load_task

PAIR_HEADER = "index\tsentence1\tsentence2\tlabel\n"
MNLI_HEADER = "\t".join([*(f"c{column}" for column in range(8)), "sentence1", "sentence2"])
STSB_HEADER = "\t".join([*(f"c{column}" for column in range(7)), "sentence1", "sentence2", "score"])

# Task: content of a file in the official layout, and the one row it holds.
LAYOUTS = {
    "cola": ('gj04\t0\t*\t"Quoted, he\n', Example('"Quoted, he', None, 0, 1)),
    "sst2": ("sentence\tlabel\ngood film \t1\n", Example("good film", None, 1, 2)),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe "said\tShe\n',
        Example('He "said', "She", 1, 2),
    ),
    "stsb": (f"{STSB_HEADER}\n" + "x\t" * 7 + "A\tB\t3.800\n", Example("A", "B", 3.8, 2)),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\nbroken\n1\t2\t3\tA?\tB?\t0\n",
        Example("A?", "B?", 0, 3),
    ),
    "mnli": (
        f"{MNLI_HEADER}\tlabel1\tgold_label\n" + "x\t" * 8 + "A\tB\tneutral\tcontradiction\n",
        Example("A", "B", 2, 2),
    ),
    "mnli-mm": (
        f"{MNLI_HEADER}\tgold_label\n" + "x\t" * 8 + "A\tB\tentailment\n",
        Example("A", "B", 0, 2),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tA?\tB\tnot_entailment\n",
        Example("A?", "B", 1, 2),
    ),
    "rte": (f"{PAIR_HEADER}0\tA\tB\tentailment\n", Example("A", "B", 0, 2)),
    "wnli": (f"{PAIR_HEADER}0\tA\tB\t1\n", Example("A", "B", 1, 2)),
}


def write_task(folder: Path, name: str, train: str, validation: str) -> Path:
    task = GLUE_TASKS[name]
    (folder / task.folder).mkdir()
    (folder / task.folder / "train.tsv").write_text(train, encoding="utf-8")
    (folder / task.folder / task.validation_file).write_text(validation, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_official_layout(tmp_path: Path, name: str) -> None:
    content, expected = LAYOUTS[name]
    data = load_task(name, write_task(tmp_path, name, content, content))
    assert data.train == data.validation == [expected]
    assert data.spec.num_labels == {"stsb": 1, "mnli": 3, "mnli-mm": 3}.get(name, 2)
    assert data.spec.primary_metric == data.spec.metrics[0]


def test_folder_may_be_given_itself(tmp_path: Path) -> None:
    content, expected = LAYOUTS["sst2"]
    folder = write_task(tmp_path, "sst2", content, content) / "SST-2"
    assert load_task("SST-2", folder).validation == [expected]


@pytest.mark.parametrize(
    ("name", "num_train", "num_validation", "first"),
    [
        (
            "sst2",
            67_349,
            872,
            Example("it 's a charming and often affecting journey .", None, 1, 2),
        ),
        (
            "cola",
            8_551,
            1_043,
            Example("The sailors rode the breeze clear of the rocks.", None, 1, 1),
        ),
        (
            "stsb",
            5_749,
            1_500,
            Example(
                "A man with a hard hat is dancing.", "A man wearing a hard hat is dancing.", 5.0, 2
            ),
        ),
    ],
)
def test_real_files(
    shared_data: Path, name: str, num_train: int, num_validation: int, first: Example
) -> None:
    data = load_task(name, shared_data)
    assert (len(data.train), len(data.validation)) == (num_train, num_validation)
    assert data.validation[0] == first
    assert all(example.text for example in data.train)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("sst2", "sentence\tlabel\na\t1\nb\t2\n", r"line 3: label='2', expected one of 0, 1"),
        ("sst2", "sentence\tlabel\na\t1\t1\n", r"line 2: 3 columns, expected 2"),
        ("sst2", "text\tlabel\na\t1\n", r"line 1: no column 'sentence' among \['text', 'label'\]"),
        ("cola", "sentence\tlabel\na\t1\n", r"line 1: 2 columns, expected 4"),
        ("rte", f"{PAIR_HEADER}0\tA\tB\tmaybe\n", r"line 2: label='maybe', expected one of ent"),
        ("stsb", LAYOUTS["stsb"][0].replace("3.800", "5.1"), r"line 2: score='5.1', expected a nu"),
        ("stsb", LAYOUTS["stsb"][0].replace("3.800", "nan"), r"line 2: score='nan', expected a nu"),
        ("stsb", LAYOUTS["stsb"][0].replace("3.800", "good"), r"line 2: score='good', expected a"),
    ],
    ids=[
        "class-out-of-range",
        "extra-column",
        "missing-column",
        "other-task",
        "unknown-class",
        "score-out-of-range",
        "nan-score",
        "score-no-number",
    ],
)
@pytest.mark.parametrize("where", ["train", "validation"])
def test_bad_row_names_file_and_line(
    tmp_path: Path, name: str, bad: str, message: str, where: str
) -> None:
    good = LAYOUTS[name][0]
    contents = (bad, good) if where == "train" else (good, bad)
    file = "train.tsv" if where == "train" else "dev.tsv"
    with pytest.raises(ValueError, match=rf"{file} {message}"):
        load_task(name, write_task(tmp_path, name, *contents))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected MNLI/dev_mismatched\.tsv"):
        load_task("mnli-mm", write_task(tmp_path, "mnli", "", ""))
    content, expected = LAYOUTS["sst2"]
    folder = write_task(tmp_path, "sst2", content, content)
    (folder / "SST-2" / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tsv"):
        load_task("sst2", folder)
    assert load_task("sst2", folder, with_train=False).validation == [expected]


class FakeHub:
    """Stands in for the `datasets` library."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, str, str]] = []

    def load_dataset(self, path: str, name: str, split: str) -> dict[str, list[Any]]:
        self.calls.append((path, name, split))
        if self.error:
            raise self.error
        return {"premise": ["A "], "hypothesis": ["B"], "label": [2], "idx": [0]}


def test_hub_rows_equal_the_official_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    data = load_task("mnli-mm", from_hub=True)
    assert [call[1:] for call in hub.calls] == [
        ("mnli", "train"),
        ("mnli", "validation_mismatched"),
    ]
    content, _ = LAYOUTS["mnli"]
    official = load_task("mnli", write_task(tmp_path, "mnli", content, content))
    assert data.train[0][:3] == official.train[0][:3] == ("A", "B", 2)
    assert data.spec.text_fields == official.spec.text_fields


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (FakeHub(RuntimeError("no route")), ConnectionError, r"hub \(no route\)\. Give a data_dir"),
        (None, ModuleNotFoundError, r"pip install 'dynabert-kernels\[train\]'"),
    ],
    ids=["offline", "not-installed"],
)
def test_hub_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
    module: SimpleNamespace | None,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        load_task("mnli", from_hub=True)
