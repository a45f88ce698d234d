"""The user's own CSV, TSV or JSONL files as a classification, regression or label-free task."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynabert.data.examples import Example, Problem, TaskSpec
from dynabert.data.files import read_rows, row_error

_METRICS: dict[Problem, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro"),
    "regression": ("spearman", "pearson"),
    "none": (),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; no `pair` for single texts, no `label` for texts alone."""

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"


@dataclass(frozen=True)
class RawRow:
    """A checked row whose label is still as the file has it: a cell's text, or a JSON number."""

    path: Path
    line: int
    text: str
    text_pair: str | None
    label: str | int | float | None


def read_user_file(path: Path, columns: Columns) -> list[RawRow]:
    """All rows of one file, with texts checked and labels as they stand.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row cannot be read, or lacks a text or label; names file and line.
    """
    return list(_raw_rows(path, columns))


def _raw_rows(path: Path, columns: Columns) -> Iterator[RawRow]:
    for line, values in read_rows(path):
        cells = []
        for column in (columns.text, columns.pair, columns.label):
            if column is not None and column not in values:
                problem = f"no column {column!r} among {list(values)}"
                raise row_error(path, line, problem, "Name the columns to read.")
            cells.append(None if column is None else values[column])
        text, pair, label = cells
        for column, cell in ((columns.text, text), (columns.pair, pair)):
            if column is not None and not (isinstance(cell, str) and cell.strip()):
                problem = f"{column}={cell!r}, expected text"
                raise row_error(path, line, problem, "Fill in or remove this row.")
        if isinstance(label, bool):
            label = str(label).lower()
        if isinstance(label, str):
            label = label.strip()
        if columns.label is not None and (label == "" or not isinstance(label, str | int | float)):
            problem = f"{columns.label}={label!r}, expected a class or a number"
            raise row_error(path, line, problem, "Fill in or remove this row.")
        yield RawRow(
            path,
            line,
            str(text).strip(),
            None if pair is None else str(pair).strip(),
            label if isinstance(label, str | int | float) else None,
        )


def infer_spec(
    rows: Iterable[RawRow],
    columns: Columns,
    problem: Literal["auto"] | Problem,
    label_names: Sequence[str] | None,
) -> TaskSpec:
    """What the labels of the training rows ask for.

    Labels that are all numbers, and not all whole, are scores; anything else names classes, which
    are ordered as numbers where they all are and by their text otherwise.

    Args:
        rows: The training rows.
        columns: The columns they were read from.
        problem: The kind of problem, or ``auto`` to tell from the labels.
        label_names: The classes, when known beforehand; None: those of the rows.

    Raises:
        ValueError: Fewer than two classes.
    """
    labels = [row.label for row in rows if row.label is not None]
    fields = (columns.text,) if columns.pair is None else (columns.text, columns.pair)
    if columns.label is None:
        problem = "none"
    if problem == "auto":
        scores = label_names is None and all(_score(label) is not None for label in labels)
        problem = "regression" if scores and not _all_whole(labels) else "classification"
    names: tuple[str, ...] = ()
    if problem == "classification":
        found = {str(label) for label in labels}
        key = int if _all_whole(labels) else str
        names = tuple(label_names) if label_names else tuple(sorted(found, key=key))
        if len(names) < 2:
            raise ValueError(
                f"load_task: column {columns.label!r} holds the classes {list(names)}, "
                "expected at least two. Check the label column."
            )
    metrics = _METRICS[problem]
    return TaskSpec("file", problem, fields, names, metrics, metrics[0] if metrics else "")


def to_examples(rows: Iterable[RawRow], spec: TaskSpec) -> list[Example]:
    """Rows with their labels as class indices or scores.

    Raises:
        ValueError: A label is not among the classes, or no finite number; names file and line.
    """
    index_of = {name: index for index, name in enumerate(spec.label_names)}
    examples = []
    for row in rows:
        label: int | float | None = None
        if spec.problem == "classification":
            label = index_of.get(str(row.label))
            if label is None:
                problem = f"label {row.label!r}, expected one of {', '.join(spec.label_names)}"
                advice = "Only labels of the training file can be told apart."
                raise row_error(row.path, row.line, problem, advice)
        elif spec.problem == "regression":
            label = _score(row.label)
            if label is None or not math.isfinite(label):
                problem = f"label {row.label!r}, expected a finite number"
                raise row_error(row.path, row.line, problem, "Correct or remove this row.")
        examples.append(Example(row.text, row.text_pair, label, row.line))
    return examples


def _score(label: str | int | float | None) -> float | None:
    try:
        return None if label is None else float(label)
    except ValueError:
        return None


def _all_whole(labels: Iterable[str | int | float]) -> bool:
    """Whether every label is written as a whole number: 3 and "-3", not 3.0."""
    return all(str(label).removeprefix("-").isdecimal() for label in labels)
