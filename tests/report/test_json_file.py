"""Files are whole or as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynabert.json_file import read_json, write_bytes, write_json


def test_a_document_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    document = {"schema": 3, "name": "µ", "numbers": [1, 2.5, None]}
    write_json(path, document)
    assert read_json(path, schema=3) == document


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_values_json_cannot_express_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("inf")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 1', "expected a JSON file"),
        (b"\xff\xfe\x00", "expected a JSON file"),
        (b"[1]", "holds a list"),
        (b'{"schema": 2}', "schema=2, expected 1"),
        (b"{}", "schema=None, expected 1"),
    ],
    ids=["cut", "not-text", "list", "newer", "no-schema"],
)
def test_other_contents_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, schema=1)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", schema=1)
