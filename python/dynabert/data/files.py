"""Read CSV, TSV and JSONL files row by row; whatever is wrong is reported with its file and line.

Standard library only. Fields of a TSV are never unquoted (``csv.QUOTE_NONE``), as GLUE's files
need; a CSV follows RFC 4180.
"""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row: where it starts (1 is the first line of the file) and its values by column name."""

    line: int
    values: dict[str, object]


def read_rows(
    path: Path, columns: Sequence[str] | None = None, *, skip_ragged: bool = False
) -> Iterator[Row]:
    """Rows of a file, whose format its suffix tells: ``.csv``, ``.tsv``, ``.jsonl`` or ``.json``.

    Blank lines are passed over. In JSONL each line is one object and rows may differ in their keys;
    in the other formats every row must have as many columns as the header.

    Args:
        path: The file, UTF-8, with or without a byte order mark.
        columns: Column names of a CSV or TSV without a header line; None: the first line holds
            them.
        skip_ragged: Leave out rows with a wrong number of columns and log how many, instead of
            raising.

    Yields:
        The rows, in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Unknown suffix, not UTF-8, no rows, or a row that cannot be read; names file and
            line.
    """
    readers = {".tsv": _tsv_rows, ".csv": _csv_rows}
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        rows = _jsonl_rows(path, read_text(path))
    elif suffix in readers:
        fields = readers[suffix](path, read_text(path))
        rows = _named_rows(path, fields, columns, skip_ragged)
    else:
        raise ValueError(
            f"read_rows: path={path}, expected a .csv, .tsv or .jsonl file. Rename or convert it."
        )
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"read_rows: {path} is empty, expected at least one row. Check the file.")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def row_error(path: Path, line: int, problem: str, advice: str) -> ValueError:
    """The error for one bad row, in the form every reader of rows uses."""
    return ValueError(f"read_rows: {path} line {line}: {problem}. {advice}")


def read_text(path: Path) -> str:
    """A whole file as text, without a byte order mark.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"read_rows: path={path}, expected an existing file. Check the folder and the name."
        )
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise row_error(
            path,
            line,
            f"byte 0x{raw[error.start]:02x} at offset {error.start}, expected UTF-8 text",
            "Convert the file, for instance with iconv -t UTF-8.",
        ) from None


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines and their numbers, from 1. Only a newline ends one: text may hold U+2028."""
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r")


def _tsv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in numbered_lines(text):
        if line:
            yield number, line.split("\t")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    # strict: a quote that is never closed must not swallow the rest of the file in silence.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            advice = "Check the quotes of this row."
            raise row_error(path, start, f"not valid CSV ({error})", advice) from None
        if fields is None:
            return
        if fields:
            yield start, fields
        start = reader.line_num + 1


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in numbered_lines(text):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            advice = "Write one JSON object on each line."
            raise row_error(path, number, f"not valid JSON ({error})", advice) from None
        if not isinstance(values, dict):
            problem = f"a JSON {type(values).__name__}, expected an object"
            raise row_error(path, number, problem, "Write one JSON object on each line.")
        yield Row(number, values)


def _named_rows(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    columns: Sequence[str] | None,
    skip_ragged: bool,
) -> Iterator[Row]:
    if columns is None:
        _, columns = next(rows, (0, []))
        repeated = sorted({name for name in columns if columns.count(name) > 1})
        if repeated:
            problem = f"column names {repeated} occur more than once, expected each once"
            raise row_error(path, 1, problem, "Rename the columns.")
    num_skipped = 0
    for line, fields in rows:
        if len(fields) != len(columns) and skip_ragged:
            num_skipped += 1
            continue
        if len(fields) != len(columns):
            problem = f"{len(fields)} columns, expected {len(columns)}"
            raise row_error(path, line, problem, "Check the separators of this row.")
        yield Row(line, dict(zip(columns, fields, strict=True)))
    if num_skipped:
        _log.warning("%s: left out %d rows with a wrong number of columns", path, num_skipped)
