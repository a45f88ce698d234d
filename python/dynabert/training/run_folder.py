"""The folder of a training run: what is in it, and when a part of it counts as finished.

``run.json`` (what was asked for), a folder for each stage (a model, and ``stage.json`` once it is
finished), ``model`` (the result), ``grid.json`` and ``grid.md`` (its scores).
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynabert.data.examples import TaskData
from dynabert.json_file import read_json, write_json
from dynabert.training.arguments import STAGE_NAMES, RunArguments

_SCHEMA = 1


class RunFolder:
    """Paths and records of one run; all writing of finished parts goes through here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_dir = path / "model"
        self.grid_json = path / "grid.json"
        self.grid_markdown = path / "grid.md"

    def begin(self, run: RunArguments, data: TaskData, model_path: str) -> None:
        """Write ``run.json``, or check that the run found here is the one asked for.

        Raises:
            ValueError: The folder holds a run with other arguments, another model or other data.
        """
        path = self.path / "run.json"
        document: dict[str, Any] = {
            "schema": _SCHEMA,
            "model": model_path,
            "task": data.spec.name,
            "data": {
                "source": data.source,
                "fingerprint": data.fingerprint,
                "train_rows": len(data.train),
                "validation_rows": len(data.validation),
            },
            "arguments": run.to_dict(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        if path.exists():
            found = read_json(path, schema=_SCHEMA)
            changed = [
                name for name in ("model", "task", "data") if found.get(name) != document[name]
            ]
            former = RunArguments.from_dict(found["arguments"])
            changed += run.differences(former)
            if changed:
                raise ValueError(
                    f"run_stages: output_dir={str(self.path)!r} holds a run with another "
                    f"{', '.join(changed)}, expected the same, to resume it. Use another folder, "
                    "or the former values."
                )
            # What has been trained stays on record, even if it is not asked for this time.
            known = [s for s in STAGE_NAMES if s in {*former.stages, *run.stages}]
            document["arguments"] = {**former.to_dict(), **run.to_dict(), "stages": known}
        write_json(path, document)

    def stage_dir(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.path / stage

    def checkpoint_dir(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints while it runs."""
        return self.stage_dir(stage) / "checkpoints"

    def start_dir(self, stage: str) -> Path:
        """Where a stage that rewires keeps the rewired model it starts from, while it runs."""
        return self.stage_dir(stage) / "rewired"

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The record of a stage, or None if it is not finished."""
        path = self.stage_dir(stage) / "stage.json"
        return read_json(path, schema=_SCHEMA) if path.exists() else None

    def finish(
        self,
        stage: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        record: dict[str, Any],
    ) -> None:
        """Save a stage's model and, last of all, its record; then remove what only an unfinished
        stage needs."""
        folder = self.stage_dir(stage)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "stage.json", {"schema": _SCHEMA, "done": True, **record})
        shutil.rmtree(self.checkpoint_dir(stage), ignore_errors=True)
        shutil.rmtree(self.start_dir(stage), ignore_errors=True)


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save a model so that `folder` either holds all of it or what it held before."""
    written = folder.with_name(f".{folder.name}.{os.getpid()}")
    former = folder.with_name(f".{folder.name}.former")
    for leftover in (written, former):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(written)
    if tokenizer is not None:
        tokenizer.save_pretrained(written)
    if folder.exists():
        os.replace(folder, former)
    os.replace(written, folder)
    shutil.rmtree(former, ignore_errors=True)
