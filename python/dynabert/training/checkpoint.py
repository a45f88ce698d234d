"""Checkpoints that are whole, and are known to be: a folder ``checkpoint-<step>`` for each.

`transformers.Trainer` writes a checkpoint file by file into its place; on resuming it takes the
newest folder, and starts with fresh optimiser or random state where a file is missing. Here a
checkpoint appears by one renaming, with a manifest of the size and SHA-256 of every file, and
nothing is resumed from that does not match its manifest.
"""

from __future__ import annotations

import hashlib
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dynabert.durable import remove_folder, replace_folder
from dynabert.json_file import read_json, write_json

_log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_SCHEMA = 2
_CHUNK_BYTES = 1 << 22
_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*")
# What a checkpoint cannot do without, and the files that may hold it.
_NEEDED = {
    "weights": _WEIGHTS,
    "optimiser state": ("optimizer*",),
    "scheduler state": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "trainer state": ("trainer_state.json",),
}


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` optimiser steps."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def commit_checkpoint(
    staged: Path, checkpoint: Path, *, best: str | None, num_processes: int
) -> None:
    """Put a checkpoint that has been written elsewhere in its place, whole.

    Args:
        staged: All its files, in the same file system.
        checkpoint: Where it belongs.
        best: Name of the checkpoint beside it that has the best weights so far: without those this
            one is of no use.
        num_processes: How many processes have written it, and can resume from it.
    """
    files = {
        path.relative_to(staged).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    manifest = {"best": best, "num_processes": num_processes, "files": files}
    write_json(staged / _MANIFEST, {"schema": _SCHEMA, **manifest})
    replace_folder(staged, checkpoint)


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that is undamaged; None if there is none.

    Each damaged one that is passed over for it is named in a warning.
    """
    found, damaged = None, []
    for checkpoint in _newest_first(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            found = checkpoint
            break
        damaged.append((checkpoint.name, damage))
    then = f"going on from {found.name}" if found else "starting anew"
    for name, damage in damaged:
        _log.warning("%s in %s: %s; %s", name, folder, damage, then)
    return found


def find_damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed from, as a clause; None if nothing does.

    Reads all its files, and the best weights it refers to.
    """
    try:
        manifest = _manifest(checkpoint)
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    files = manifest["files"]
    for content, patterns in _NEEDED.items():
        if not any(_matches(name, patterns) for name in files):
            return f"it was saved without {content}"
    damage = _differing_file(checkpoint, files)
    if damage is None and manifest["best"] not in (None, checkpoint.name):
        best = checkpoint.with_name(manifest["best"])
        damage = _damaged_weights(best)
        if damage is not None:
            return f"the best weights so far are lost, as in {best.name} {damage}"
    return damage


def num_processes_of(checkpoint: Path) -> int:
    """How many processes wrote an undamaged checkpoint."""
    return int(_manifest(checkpoint)["num_processes"])


def rotate_checkpoints(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints, but for the `keep` newest whole ones up to `step` and the best weights
    each of them refers to.

    What has more steps is of a former attempt, and was not worth going on from.
    """
    kept: set[str] = set()
    num_kept = 0
    for checkpoint in _newest_first(folder):
        if num_kept == keep or _step_of(checkpoint) > step:
            continue
        try:
            manifest = _manifest(checkpoint)
        except (OSError, ValueError):
            continue
        # Sizes only: hashing everything at every save would take longer than saving.
        if _differing_size(checkpoint, manifest["files"]) is None:
            kept |= {checkpoint.name, manifest["best"] or checkpoint.name}
            num_kept += 1
    for checkpoint in _newest_first(folder):
        if checkpoint.name not in kept:
            remove_folder(checkpoint)


def _damaged_weights(checkpoint: Path) -> str | None:
    """What is wrong with the weights of a checkpoint, the rest of which is not needed."""
    try:
        files = _manifest(checkpoint)["files"]
    except (OSError, ValueError):
        return f"{_MANIFEST} is missing or cannot be read"
    return _differing_file(checkpoint, {n: f for n, f in files.items() if _matches(n, _WEIGHTS)})


def _differing_file(checkpoint: Path, files: dict[str, Any]) -> str | None:
    """The first file that is not as recorded: sizes of all first, which takes no reading."""
    damage = _differing_size(checkpoint, files)
    if damage is not None:
        return damage
    for name, recorded in files.items():
        try:
            digest = _sha256(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if digest != recorded["sha256"]:
            return f"{name} has another SHA-256 than in {_MANIFEST}"
    return None


def _differing_size(checkpoint: Path, files: dict[str, Any]) -> str | None:
    for name, recorded in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != recorded["size_bytes"]:
            return f"{name} has {size} bytes, expected {recorded['size_bytes']}"
    return None


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, with all the fields and types the code above relies on.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is malformed.
    """
    manifest = read_json(checkpoint / _MANIFEST, schema=_SCHEMA)
    files, best = manifest.get("files"), manifest.get("best")
    if not (
        isinstance(files, dict)
        and all(
            isinstance(file, dict) and {"size_bytes", "sha256"} <= set(file)
            for file in files.values()
        )
        and isinstance(best, str | None)
        and isinstance(manifest.get("num_processes"), int)
    ):
        raise ValueError("a field is missing or of another type")
    return manifest


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _newest_first(folder: Path) -> list[Path]:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    checkpoints = [path for path in found if _step_of(path) >= 0 and path.is_dir()]
    return sorted(checkpoints, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    """Steps of a checkpoint's name; -1 if it is not a checkpoint's."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
