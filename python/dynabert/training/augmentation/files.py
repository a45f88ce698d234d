"""Augmented rows on disk: written part by part, resumable, and read back row by row.

``aug.jsonl`` has one object a line: ``text``, ``text_pair`` of pairs, ``line`` of the row it was
made from and ``attempt``. While it is being written it is ``aug.jsonl.part``. Beside it,
``aug.jsonl.json`` records what it was made of and how far it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

from dynabert.data.examples import Example
from dynabert.data.files import row_error
from dynabert.durable import sync_folder
from dynabert.json_file import read_json, write_json
from dynabert.training.augmentation.sources import CandidateSource
from dynabert.training.augmentation.variants import (
    AugmentationArguments,
    AugmentedRow,
    augmented_rows,
)

_log = logging.getLogger(__name__)
_SCHEMA = 1
# Rows whose words are looked up together, and what an interruption costs: some 2,500 masked
# copies, enough to fill batches of like length.
_PART_ROWS = 256


@dataclass(frozen=True)
class AugmentedFile:
    """What `write_augmented` has made.

    Attributes:
        path: The file.
        num_examples: Rows it was made from.
        num_rows: Rows it holds.
        seconds: Time it took, interrupted calls included.
    """

    path: Path
    num_examples: int
    num_rows: int
    seconds: float


def write_augmented(
    path: Path | str,
    examples: Sequence[Example],
    source: CandidateSource,
    arguments: AugmentationArguments,
    *,
    progress: bool = True,
) -> AugmentedFile:
    """Write `augmented_rows` of all examples to a JSONL file, or go on where a former call stopped.

    The file has the same bytes however often it was interrupted. A finished one is only reported.

    Args:
        path: The file, ``.jsonl``; it appears once it is whole.
        examples: Rows to vary; labels are not looked at.
        source: Proposes replacements.
        arguments: How variants are drawn.
        progress: Show a bar on stderr.

    Raises:
        ValueError: There are no examples; or the file, or an unfinished one, is of other examples,
            another source or other arguments, or is not known to come from here.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(
            f"write_augmented: path={path}, expected a name that ends in .jsonl. Rename it."
        )
    if not examples:
        raise ValueError("write_augmented: examples=[], expected at least one. Check the task.")
    state = _State.find(path, examples, source, arguments)
    if path.exists():
        _log.info("%s is finished", path)
        return state.summary()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        state.part.open("r+b" if state.num_done else "wb") as stream,
        tqdm(
            total=len(examples),
            initial=state.num_done,
            desc="augment",
            unit="row",
            disable=not progress,
        ) as bar,
    ):
        # A row that an interruption cut, and whole ones that were not recorded, are made again.
        stream.truncate(state.size_bytes)
        stream.seek(state.size_bytes)
        for start in range(state.num_done, len(examples), _PART_ROWS):
            began = perf_counter()
            chunk = examples[start : start + _PART_ROWS]
            rows = augmented_rows(chunk, source, arguments)
            stream.write("".join(map(_line, rows)).encode())
            stream.flush()
            os.fsync(stream.fileno())
            state.num_done += len(chunk)
            state.num_rows += len(rows)
            state.size_bytes = stream.tell()
            state.seconds += perf_counter() - began
            state.save()
            bar.update(len(chunk))
    os.replace(state.part, path)
    sync_folder(path.parent)
    return state.summary()


def read_augmented(path: Path | str) -> Iterator[AugmentedRow]:
    """The rows of a file, one at a time; `line` and `attempt` are 0 where a row has none.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, a row cannot be read, or only some have a second text; names
            file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_augmented: path={path}, expected an existing file. Make it with dynabert "
            "augment; an unfinished one goes on by the same command."
        )
    are_pairs = None
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            row = _parsed(path, number, line)
            if are_pairs is None:
                are_pairs = row.text_pair is not None
            if are_pairs != (row.text_pair is not None):
                problem = f"{'no' if are_pairs else 'a'} text_pair, unlike the lines before"
                raise row_error(path, number, problem, "Give all rows a second text, or none.")
            yield row
    if are_pairs is None:
        raise ValueError(
            f"read_augmented: {path} is empty, expected at least one row. Check the file."
        )


@dataclass
class _State:
    """How far a file is; what ``.jsonl.json`` holds."""

    path: Path
    parameters: dict[str, Any]
    num_examples: int
    num_done: int = 0
    num_rows: int = 0
    size_bytes: int = 0
    seconds: float = 0.0

    @property
    def part(self) -> Path:
        """The unfinished file."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def record(self) -> Path:
        """Where this state is kept."""
        return self.path.with_name(f"{self.path.name}.json")

    @classmethod
    def find(
        cls,
        path: Path,
        examples: Sequence[Example],
        source: CandidateSource,
        arguments: AugmentationArguments,
    ) -> _State:
        """The state a former call left, or a new one.

        Raises:
            ValueError: What is there was made of something else.
        """
        parameters = {
            "data": _digest(examples),
            "source": source.identity,
            **arguments.to_dict(),
        }
        state = cls(path, parameters, len(examples))
        if not state.record.exists():
            if path.exists():
                raise ValueError(
                    f"write_augmented: {path} exists without {state.record.name}, expected a file "
                    "made here. Use another name."
                )
            return state
        if not path.exists() and not state.part.exists():
            return state
        found = read_json(state.record, schema=_SCHEMA)
        former = found["parameters"]
        changed = [name for name in parameters if former.get(name) != parameters[name]]
        if changed:
            raise ValueError(
                f"write_augmented: {path if path.exists() else state.part} was made with another "
                f"{', '.join(changed)}, expected the same, to go on with it. Use another name, or "
                "the former values."
            )
        state = cls(path, parameters, len(examples), **found["progress"])
        if path.exists() and (
            state.num_done < len(examples) or path.stat().st_size != state.size_bytes
        ):
            raise ValueError(
                f"write_augmented: {path} is not as {state.record.name} says, expected it "
                "unchanged. Use another name, or remove both."
            )
        if not path.exists() and state.part.stat().st_size < state.size_bytes:
            _log.warning("%s is shorter than recorded; it is made anew", state.part)
            return cls(path, parameters, len(examples))
        return state

    def save(self) -> None:
        """Record this state."""
        progress = {
            "num_done": self.num_done,
            "num_rows": self.num_rows,
            "size_bytes": self.size_bytes,
            "seconds": self.seconds,
        }
        write_json(
            self.record, {"schema": _SCHEMA, "parameters": self.parameters, "progress": progress}
        )

    def summary(self) -> AugmentedFile:
        """The finished file."""
        return AugmentedFile(self.path, self.num_examples, self.num_rows, self.seconds)


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        row = [example.text, example.text_pair, example.line]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _line(row: AugmentedRow) -> str:
    values = {name: value for name, value in row._asdict().items() if value is not None}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _parsed(path: Path, number: int, line: bytes) -> AugmentedRow:
    advice = "Make the file again with dynabert augment, or correct this row."
    try:
        values = json.loads(line)
    except ValueError as error:
        raise row_error(path, number, f"not valid JSON ({error})", advice) from None
    if not isinstance(values, dict):
        problem = f"a JSON {type(values).__name__}, expected an object"
        raise row_error(path, number, problem, advice)
    text: Any = values.get("text")
    row = AugmentedRow(
        text,
        values.get("text_pair"),
        values.get("line", 0),
        values.get("attempt", 0),
    )
    for name in ("text", "text_pair"):
        value = getattr(row, name)
        is_text = isinstance(value, str) and bool(value.strip())
        if not is_text and not (name == "text_pair" and value is None):
            raise row_error(path, number, f"{name}={value!r}, expected text", advice)
    for name in ("line", "attempt"):
        value = getattr(row, name)
        if not isinstance(value, int):
            raise row_error(path, number, f"{name}={value!r}, expected a whole number", advice)
    return row
