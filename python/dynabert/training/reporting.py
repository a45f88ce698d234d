"""The log of a run in experiment trackers: the integrations of `transformers.Trainer`, one log for
each stage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

# These go on with the log that is open in the process; the others begin one whenever training does.
_KEPT_OPEN = ("wandb", "swanlab")


def check_integrations(names: Sequence[str]) -> None:
    """Refuse an integration that cannot be used here.

    Raises:
        ValueError: transformers does not know it, or what it needs is not installed.
    """
    if not names:
        return
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ValueError(
                f"run_stages: report_to={name!r}, expected one of {', '.join(available) or 'none'}"
                " here. Install what it needs, or leave it out."
            )


def stage_reports(names: Sequence[str], log_dir: Path) -> list[TrainerCallback]:
    """Callbacks that report one stage to the integrations `names`.

    Args:
        names: As `check_integrations` takes them.
        log_dir: Folder of the stage's log files, for TensorBoard; where TENSORBOARD_LOGGING_DIR is
            set, a folder of the same name there.
    """
    callbacks: list[Any] = [
        callback() for callback in get_reporting_integration_callbacks(list(names))
    ]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            base = callback.logging_dir
            callback.logging_dir = str(log_dir if base is None else Path(base) / log_dir.name)
    return [*callbacks, *(_EndOfLog(name) for name in names if name in _KEPT_OPEN)]


class _EndOfLog(TrainerCallback):
    """Closes the log of a stage, so that the next stage begins its own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            import_module(self._name).finish()
