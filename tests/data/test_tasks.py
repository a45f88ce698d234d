from pathlib import Path
from typing import Any

import pytest

from dynabert.data.tasks import TASK_NAMES, load_task


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    rows = "sentence\tlabel\n" + "".join(f"film {row}\t{int(row < 9)}\n" for row in range(40))
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(rows)
    return tmp_path


def test_training_rows_are_chosen_and_validation_rows_are_not(sst2: Path) -> None:
    data = load_task("sst2", sst2, max_train_rows=10, balanced=True, seed=4)
    assert len(data.train) == 10
    assert sum(example.label == 1 for example in data.train) == 5
    assert len(data.validation) == 40
    assert load_task("sst2", sst2, max_train_rows=10, balanced=True, seed=4) == data


def test_fingerprint_tells_files_and_options_apart(sst2: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return load_task("sst2", sst2, **options).fingerprint

    seen = {
        fingerprint(),
        fingerprint(seed=1),
        fingerprint(max_train_rows=10),
        fingerprint(max_train_rows=10, balanced=True),
        fingerprint(problem="none"),
        fingerprint(with_train=False),
    }
    assert len(seen) == 6
    assert fingerprint() in seen
    with (sst2 / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    assert fingerprint() not in seen


def test_examples_come_with_the_files_their_lines_are_of(sst2: Path) -> None:
    data = load_task("sst2", sst2)
    assert (data.train_file, data.validation_file) == (sst2 / "train.tsv", sst2 / "dev.tsv")
    options: dict[str, Any] = {"text_column": "sentence"}
    own = load_task("file", sst2, train_file="train.tsv", validation_file="dev.tsv", **options)
    assert (own.train_file, own.validation_file) == (sst2 / "train.tsv", sst2 / "dev.tsv")
    held_out = load_task("file", sst2, train_file="train.tsv", **options)
    assert held_out.train_file == held_out.validation_file == sst2 / "train.tsv"
    embedded = load_task("stdlib")
    assert embedded.train_file is embedded.validation_file is None


def test_labels_of_any_task_can_be_dropped(sst2: Path) -> None:
    data = load_task("sst2", sst2, problem="none")
    assert data.spec.problem == "none"
    assert data.spec.num_labels == 0
    assert {example.label for example in data.train + data.validation} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sst3"}, r"task='sst3', expected one of cola, sst2"),
        ({"task": "sst2"}, r"data_dir=None, expected the folder of SST-2"),
        ({"task": "stdlib", "data_dir": "x"}, r"data_dir=x with task='stdlib'"),
        ({"task": "file"}, r"train_file=None with task='file'"),
        ({"task": "file", "with_train": False}, r"validation_file=None with task='file'"),
        ({"task": "sst2", "train_file": "x.csv"}, r"task='sst2' with train_file"),
        ({"task": "sst2", "problem": "regression"}, r"task='sst2' with train_file, valid"),
        ({"task": "stdlib", "problem": "ranking"}, r"problem='ranking', expected auto, class"),
        ({"task": "stdlib", "max_train_rows": 0}, r"max_train_rows=0, expected at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(**arguments)


def test_names_are_those_of_glue_and_three_more() -> None:
    assert set(TASK_NAMES) == {
        *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli"),
        *("squad", "stdlib", "file"),
    }
