"""GLUE: the official files of a local folder, or the same rows through the `datasets` library."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dynabert.data.examples import Example, TaskSpec
from dynabert.data.files import read_rows, row_error


@dataclass(frozen=True)
class GlueTask:
    """How GLUE lays out one task, in its official files and in the data set ``nyu-mll/glue``.

    Attributes:
        folder: Official name of the folder.
        text_fields: The columns of the one or two texts.
        label_field: The column of the label.
        label_names: The classes, in the order of the data set; empty for a score.
        label_values: What the label column may hold, and the index of the class it means.
        metrics: The official metrics, the one DynaBERT's table 1 reports first.
        columns: All columns, for a file without a header line.
        skip_ragged: The official file has broken rows, which everyone leaves out.
        validation_file: File of the validation rows.
        hub_name: Configuration in the data set; empty: the task's own name.
        hub_text_fields: Text columns there; empty: as in the files.
        hub_validation: Validation split there.
        score_range: Lowest and highest score.
    """

    folder: str
    text_fields: tuple[str, ...]
    label_field: str = "label"
    label_names: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] | None = None
    skip_ragged: bool = False
    validation_file: str = "dev.tsv"
    hub_name: str = ""
    hub_text_fields: tuple[str, ...] = ()
    hub_validation: str = "validation"
    score_range: tuple[float, float] = (0.0, 5.0)

    def spec(self, name: str) -> TaskSpec:
        """The task as the rest of the library sees it."""
        return TaskSpec(
            name=name,
            problem="classification" if self.label_names else "regression",
            text_fields=self.hub_text_fields or self.text_fields,
            label_names=self.label_names,
            metrics=self.metrics,
            primary_metric=self.metrics[0],
        )


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI_CLASSES = ("entailment", "neutral", "contradiction")

_MNLI = GlueTask(
    "MNLI",
    _SENTENCES,
    label_field="gold_label",
    label_names=_MNLI_CLASSES,
    label_values=_MNLI_CLASSES,
    validation_file="dev_matched.tsv",
    hub_name="mnli",
    hub_text_fields=("premise", "hypothesis"),
    hub_validation="validation_matched",
)

GLUE_TASKS = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        label_names=("unacceptable", "acceptable"),
        metrics=("mcc",),
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), label_names=("negative", "positive")),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        label_field="Quality",
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        hub_text_fields=_SENTENCES,
    ),
    "stsb": GlueTask("STS-B", _SENTENCES, label_field="score", metrics=("spearman", "pearson")),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        label_field="is_duplicate",
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        skip_ragged=True,
    ),
    "mnli": _MNLI,
    "mnli-mm": replace(
        _MNLI, validation_file="dev_mismatched.tsv", hub_validation="validation_mismatched"
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), label_names=_ENTAILMENT, label_values=_ENTAILMENT
    ),
    "rte": GlueTask("RTE", _SENTENCES, label_names=_ENTAILMENT, label_values=_ENTAILMENT),
    "wnli": GlueTask("WNLI", _SENTENCES, label_names=("not_entailment", "entailment")),
}


def glue_files(name: str, data_dir: Path) -> dict[str, Path]:
    """The task's files by split, in ``data_dir/<official folder>`` or in `data_dir` itself.

    Raises:
        FileNotFoundError: Neither folder holds the validation file.
    """
    task = GLUE_TASKS[name]
    for folder in (data_dir / task.folder, data_dir):
        if (folder / task.validation_file).is_file():
            return {"train": folder / "train.tsv", "validation": folder / task.validation_file}
    raise FileNotFoundError(
        f"load_task: data_dir={data_dir}, expected {task.folder}/{task.validation_file} or "
        f"{task.validation_file} in it. Give the folder of GLUE's official files."
    )


def read_glue_file(name: str, path: Path) -> list[Example]:
    """All rows of one official file, checked.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row cannot be read; names file and line.
    """
    return list(_file_examples(GLUE_TASKS[name], path))


def _file_examples(task: GlueTask, path: Path) -> Iterator[Example]:
    for line, values in read_rows(path, task.columns, skip_ragged=task.skip_ragged):
        for column in (*task.text_fields, task.label_field):
            if column not in values:
                problem = f"no column {column!r} among {list(values)}"
                raise row_error(path, 1, problem, f"Is this the official file of {task.folder}?")
        first, *second = (str(values[column]).strip() for column in task.text_fields)
        label = _label(task, path, line, str(values[task.label_field]))
        yield Example(first, second[0] if second else None, label, line)


def _label(task: GlueTask, path: Path, line: int, value: str) -> int | float:
    advice = "Correct this row or take the official file."
    if task.label_names:
        if value not in task.label_values:
            allowed = ", ".join(task.label_values)
            problem = f"{task.label_field}={value!r}, expected one of {allowed}"
            raise row_error(path, line, problem, advice)
        return task.label_values.index(value)
    low, high = task.score_range
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        problem = f"{task.label_field}={value!r}, expected a number from {low:g} to {high:g}"
        raise row_error(path, line, problem, advice)
    return score


def download_glue(name: str, split: str) -> list[Example]:
    """The rows of one split through `datasets`, which keeps them in its own cache.

    Args:
        name: The task, a key of `GLUE_TASKS`.
        split: ``train`` or ``validation``.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        ConnectionError: The data set could not be fetched.
    """
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"load_task: task={name} from the hub needs `datasets`, which is not installed. "
            "Run pip install 'dynabert-kernels[train]', or give a data_dir."
        ) from None
    task = GLUE_TASKS[name]
    hub_split = task.hub_validation if split == "validation" else split
    try:
        rows: Any = datasets.load_dataset("nyu-mll/glue", task.hub_name or name, split=hub_split)
    except Exception as error:  # datasets and the HTTP libraries below it share no base class
        raise ConnectionError(
            f"load_task: task={name} could not be fetched from the hub ({error}). "
            "Give a data_dir with the official files to work offline."
        ) from error
    columns = [list(rows[column]) for column in (task.hub_text_fields or task.text_fields)]
    convert = int if task.label_names else float
    pairs = columns[1] if len(columns) == 2 else [None] * len(columns[0])
    return [
        Example(text.strip(), pair and pair.strip(), convert(label), line)
        for line, (text, pair, label) in enumerate(
            zip(columns[0], pairs, rows["label"], strict=True), start=1
        )
    ]
