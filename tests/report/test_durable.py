"""A folder is the new one or the former one, whichever operation its process dies in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dynabert.durable import (
    is_leftover,
    recover_folder,
    remove_folder,
    remove_leftovers,
    replace_folder,
    staged_folder,
)


class Killed(BaseException):
    """Stands for the end of the process."""


def dies_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what changes the disk or waits for it, so that the call of this number never is."""
    calls = 0

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            nonlocal calls
            calls += 1
            if calls > call:
                raise Killed
            function(*args, **kwargs)

        return run

    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


def make_folder(path: Path, content: str) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "a").write_text(content)
    (path / "sub" / "b").write_text(content)
    return path


def content_of(path: Path) -> set[str]:
    return {file.read_text() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("call", range(10))
def test_a_replaced_folder_is_the_former_or_the_new_one(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "folder", "former")
    staged = make_folder(tmp_path / ".folder.staged", "new")
    with monkeypatch.context() as patch:
        dies_at(call, patch)
        # Four synchronised before anything moves, two renamings, and two removals around them.
        if call < 9:
            with pytest.raises(Killed):
                replace_folder(staged, folder)
        else:
            replace_folder(staged, folder)
    recover_folder(folder)
    assert content_of(folder) == {"new" if call > 6 else "former"}
    assert sorted(path.name for path in folder.iterdir()) == ["a", "sub"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_failed_leaves_the_former_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", "former")
    with pytest.raises(OSError, match="disk full"), staged_folder(folder) as staged:
        (staged / "a").write_text("new")
        raise OSError("disk full")
    assert content_of(folder) == {"former"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_staged_folder_begins_empty_and_takes_its_place(tmp_path: Path) -> None:
    make_folder(tmp_path / ".folder.staged", "of a killed process")
    with staged_folder(tmp_path / "folder") as staged:
        assert not list(staged.iterdir())
        (staged / "a").write_text("new")
        assert not (tmp_path / "folder").exists()
    assert content_of(tmp_path / "folder") == {"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize("call", range(3))
def test_a_removed_folder_is_whole_or_hidden(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "folder", "former")
    with monkeypatch.context() as patch:
        dies_at(call, patch)
        with pytest.raises(Killed):
            remove_folder(folder)
    assert folder.exists() == (call < 2)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == ([folder] if call < 2 else [])


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = {make_folder(tmp_path / name, "") for name in (".hidden", "a.staged", ".git.former.d")}
    make_folder(tmp_path / ".a.staged", "")
    make_folder(tmp_path / ".a.former", "")
    (tmp_path / ".run.json.0f.staged").write_text("{")
    assert len([path for path in tmp_path.iterdir() if is_leftover(path)]) == 3
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept
