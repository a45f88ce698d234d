"""Checkpoints that are known to be whole: one interrupted while being written is never resumed
from.

`transformers.Trainer` writes a checkpoint file by file and, on resuming, takes the newest folder
and starts with fresh optimiser or random state where a file is missing. Here a manifest with the
size of every file is written last, and only folders that match their manifest count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dynabert.json_file import read_json, write_json

_MANIFEST = "manifest.json"
_SCHEMA = 1


class CheckpointCallback(TrainerCallback):
    """Saves every `save_steps` optimiser steps, beside the Trainer's own strategy, and marks what
    is complete."""

    def __init__(self, save_steps: int) -> None:
        self._save_steps = save_steps

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ask for a checkpoint when one is due."""
        if state.global_step % self._save_steps == 0:
            control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Write the manifest of the checkpoint that has just been saved."""
        if state.is_world_process_zero:
            mark_complete(
                Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            )


def mark_complete(checkpoint: Path) -> None:
    """Record that `checkpoint` is whole: the names and sizes of its files."""
    write_json(checkpoint / _MANIFEST, {"schema": _SCHEMA, "size_bytes": _sizes(checkpoint)})


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps among those that match their manifest; None if there is
    none."""
    found = [
        (int(number), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdigit() and _is_complete(path)
    ]
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        manifest = read_json(checkpoint / _MANIFEST, schema=_SCHEMA)
    except (FileNotFoundError, ValueError):
        return False
    return bool(manifest.get("size_bytes") == _sizes(checkpoint))


def _sizes(checkpoint: Path) -> dict[str, int]:
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }
