"""The folder of a training run: what is in it, and when a part of it counts as finished.

``run.json`` (what was asked for), a folder for each stage (a model, and ``stage.json`` once it is
finished), ``model`` (the result), ``grid.json`` and ``grid.md`` (its scores).
"""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynabert.data.examples import TaskData
from dynabert.data.files import file_digest
from dynabert.durable import recover_folder, remove_leftovers, staged_folder
from dynabert.json_file import read_json, write_json
from dynabert.latency_table import hardware_name
from dynabert.training.arguments import LABEL_FREE_STAGES, STAGE_NAMES, RunArguments

_log = logging.getLogger(__name__)
_SCHEMA = 1


class RunFolder:
    """Paths and records of one run; all writing of finished parts goes through here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_dir = path / "model"
        self.grid_json = path / "grid.json"
        self.grid_markdown = path / "grid.md"

    def begin(self, run: RunArguments, data: TaskData, model_path: str, *, bf16: bool) -> None:
        """Write ``run.json``, or check that the run found here is the one asked for.

        What remains to be trained may be trained elsewhere; a warning says what is different there
        and decides the last bits of the result.

        Args:
            run: What is asked for.
            data: The task.
            model_path: The model the run starts from.
            bf16: Whether it trains in bfloat16; the arguments may leave that to the hardware.

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
            "data_options": dict(data.options),
            # The content of the augmented file, wherever it lies.
            "augmented": run.augmented_file and file_digest(run.augmented_file),
            "arguments": run.to_dict(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "numerics": {
                "bf16": bf16,
                "hardware": hardware_name(_device(run)),
                "threads": torch.get_num_threads(),
            },
        }
        if path.exists():
            found = read_json(path, schema=_SCHEMA)
            changed = [
                name for name in ("model", "task", "data") if found.get(name) != document[name]
            ]
            former = RunArguments.from_dict(found["arguments"])
            changed += run.differences(former)
            if set(LABEL_FREE_STAGES).intersection(former.stages) and (
                found.get("augmented") != document["augmented"]
            ):
                changed.append("augmented_file")
            if changed:
                raise ValueError(
                    f"run_stages: output_dir={str(self.path)!r} holds a run with another "
                    f"{', '.join(changed)}, expected the same, to resume it. Use another folder, "
                    "or the former values."
                )
            if all(self.finished(stage) for stage in run.stages):
                return
            self._warn_of_other_numerics(found, document)
            # What has been trained stays on record, even if it is not asked for this time.
            known = [s for s in STAGE_NAMES if s in {*former.stages, *run.stages}]
            document["arguments"] = {**former.to_dict(), **run.to_dict(), "stages": known}
        write_json(path, document)

    def _warn_of_other_numerics(self, found: dict[str, Any], now: dict[str, Any]) -> None:
        former, present = (
            {
                "torch": record["versions"]["torch"],
                "transformers": record["versions"]["transformers"],
                **record.get("numerics", {}),
            }
            for record in (found, now)
        )
        changed = [
            f"{name}={present[name]} (was {value})"
            for name, value in former.items()
            if present.get(name) != value
        ]
        if changed:
            _log.warning(
                "%s goes on with %s: its weights will not be, to the last bit, those of a run that "
                "was never stopped",
                self.path,
                ", ".join(changed),
            )

    def stage_dir(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.path / stage

    def checkpoint_dir(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints while it runs."""
        return self.stage_dir(stage) / "checkpoints"

    def log_dir(self, stage: str) -> Path:
        """Where TensorBoard finds a stage's log."""
        return self.path / "logs" / stage

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
        weights: dict[str, Any] | None = None,
    ) -> None:
        """Put a stage's model, or its `weights`, and its record in the place of what an unfinished
        stage needs."""
        # Of an earlier stage: a grid that is there is that of the last finished stage.
        self.grid_json.unlink(missing_ok=True)
        with staged_folder(self.stage_dir(stage)) as folder:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            write_json(folder / "stage.json", {"schema": _SCHEMA, "done": True, **record})

    def recover(self, stage: str) -> None:
        """Make good what a process left that was killed while it finished a stage."""
        recover_folder(self.stage_dir(stage))

    def remove_leftovers(self) -> None:
        """Remove what killed processes left in the folder; no other process may be writing."""
        remove_leftovers(self.path)


def _device(run: RunArguments) -> str:
    return "cpu" if run.use_cpu or not torch.cuda.is_available() else "cuda"
