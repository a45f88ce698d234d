"""A progress bar for one stage of training."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StageProgress(TrainerCallback):
    """One bar on stderr, with the last logged loss and score.

    The Trainer's own bar writes every log line, with its dozen losses, to stdout, which belongs to
    results.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step training resumes from."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self._name, unit="step"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on by one step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss and grid mean."""
        for key, label in (("loss", "loss"), ("eval_grid_mean", "grid_mean")):
            if logs and key in logs:
                self._shown[label] = f"{logs[key]:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
