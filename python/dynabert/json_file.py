"""Read and write the JSON files of a run: whole or not at all, with a schema number.

A file is written under a temporary name in the same folder and then renamed, so a reader never sees
half of one, and what has been written outlives the process and the machine.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from dynabert.durable import staged_name, sync_folder


def write_json(path: Path | str, document: dict[str, Any]) -> None:
    """Write `document` to `path`, replacing what was there only once all of it is on disk.

    Raises:
        ValueError: The document holds a value JSON cannot express, such as NaN; the file is left as
            it was.
    """
    path = Path(path)
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there only once all of it is on disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = staged_name(path.with_name(f"{path.name}.{uuid.uuid4().hex}"))
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path | str, *, schema: int) -> dict[str, Any]:
    """The document at `path`, checked to be of the schema this version reads.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, not an object, or of another schema; the message names the file.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"read_json: path={str(path)!r}, expected a JSON file ({error}). Write it again."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(
            f"read_json: path={str(path)!r} holds a {type(document).__name__}, expected an object. "
            "Write it again."
        )
    if document.get("schema") != schema:
        raise ValueError(
            f"read_json: path={str(path)!r} has schema={document.get('schema')!r}, "
            f"expected {schema}. Write it again with this version."
        )
    return document
