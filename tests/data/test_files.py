import hashlib
from pathlib import Path

import pytest

from dynabert.data.files import file_digest, read_rows


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_tsv_keeps_quotes_and_unicode_line_separators(tmp_path: Path) -> None:
    content = '\ufefftext\tlabel\r\n"open quote\t1\r\nx\u2028y\x85z\t0'
    rows = list(read_rows(write(tmp_path, "a.tsv", content)))
    assert rows == [
        (2, {"text": '"open quote', "label": "1"}),
        (3, {"text": "x\u2028y\x85z", "label": "0"}),
    ]


def test_csv_line_is_where_the_row_starts(tmp_path: Path) -> None:
    content = 'text,label\n"two\nlines, ""quoted""",1\n\nplain,0\n'
    rows = list(read_rows(write(tmp_path, "a.csv", content)))
    assert rows == [
        (2, {"text": 'two\nlines, "quoted"', "label": "1"}),
        (5, {"text": "plain", "label": "0"}),
    ]


def test_jsonl_keeps_types_and_passes_blank_lines(tmp_path: Path) -> None:
    content = '{"text": "a", "label": 1}\n\n  \n{"text": "b", "label": 0.5}\n'
    rows = list(read_rows(write(tmp_path, "a.jsonl", content)))
    assert rows == [(1, {"text": "a", "label": 1}), (4, {"text": "b", "label": 0.5})]


def test_columns_stand_for_a_missing_header(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path, "a.tsv", "x\t1\ny\t0"), ("text", "label")))
    assert [row.values["text"] for row in rows] == ["x", "y"]
    assert [row.line for row in rows] == [1, 2]


def test_ragged_rows_can_be_left_out_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.tsv", "a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n")
    rows = list(read_rows(path, skip_ragged=True))
    assert [row.line for row in rows] == [2, 5]
    assert f"{path}: left out 2 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"text\nok\ncaf\xe9\n", r"a\.tsv line 3: byte 0xe9 at offset 11"),
        ("a.csv", b"\xff\xfet\x00", r"a\.csv line 1: byte 0xff at offset 0"),
        ("a.tsv", b"", r"a\.tsv is empty"),
        ("a.csv", b"text,label\n", r"a\.csv is empty"),
        ("a.jsonl", b"\n\n", r"a\.jsonl is empty"),
        ("a.tsv", b"a\tb\n1\t2\n3\n", r"a\.tsv line 3: 1 columns, expected 2"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv line 2: 3 columns, expected 2"),
        ("a.csv", b'a,b\n1,2\n"never closed,3\n4,5\n', r"a\.csv line 3: not valid CSV"),
        ("a.tsv", b"a\ta\n1\t2\n", r"a\.tsv line 1: column names \['a'\] occur more than once"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl line 1: a JSON list, expected an object"),
        ("a.xlsx", b"PK", r"a\.xlsx, expected a \.csv, \.tsv or \.jsonl"),
    ],
    ids=[
        "latin1",
        "utf16",
        "empty-tsv",
        "header-only",
        "blank-jsonl",
        "few-columns",
        "many-columns",
        "open-quote",
        "repeated-column",
        "bad-json",
        "json-list",
        "unknown-suffix",
    ],
)
def test_error_names_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv"):
        list(read_rows(tmp_path / "nowhere.tsv"))


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    assert file_digest(write(tmp_path, "a", b"\x00\n")) == hashlib.sha256(b"\x00\n").hexdigest()
