"""Files and folders that are on disk whole or not at all, whenever process or machine stops.

A folder is made under a hidden name beside its place, written through to the disk, and renamed.
What a killed process leaves behind has a hidden name that ends in ``.staged`` or ``.former``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def staged_name(path: Path) -> Path:
    """Hidden name beside `path` under which its new content is made."""
    return path.with_name(f".{path.name}.staged")


def _former_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.former")


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error."""
    staged = staged_name(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        replace_folder(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def replace_folder(staged: Path, folder: Path) -> None:
    """Put `staged`, in the same file system, in the place of `folder`, which need not exist.

    A process killed between the two renames leaves no `folder`; `recover_folder` brings the former
    one back.
    """
    sync_tree(staged)
    former = _former_name(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(folder, former)
    os.rename(staged, folder)
    sync_folder(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo a `replace_folder` of `folder` that was cut short, and remove what it left behind."""
    former = _former_name(folder)
    if former.exists() and not folder.exists():
        os.rename(former, folder)
    for leftover in (former, staged_name(folder)):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is never seen with a part of its content."""
    former = _former_name(folder)
    shutil.rmtree(former, ignore_errors=True)
    os.rename(folder, former)
    shutil.rmtree(former, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether `path` is named like what a killed process leaves behind."""
    return path.name.startswith(".") and path.suffix in (".staged", ".former")


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left in `parent`; nobody else may be writing there."""
    for path in filter(is_leftover, parent.glob("*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Wait until everything in `folder` is on disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk, as they are now."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
