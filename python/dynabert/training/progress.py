"""Progress of one stage of training, on stderr: a bar on a terminal, elsewhere a line now and then.

The Trainer's own bar writes every log line, with its dozen losses, to stdout, which belongs to
results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SECONDS_BETWEEN_LINES = 10.0
_SHARE_BETWEEN_LINES = 0.05


class StageProgress(TrainerCallback):
    """Shows steps, rate, remaining time, and the last logged loss and score of a stage.

    A line is written once ten seconds have passed and a twentieth of the steps has been taken; the
    first needs the seconds only. Rate and remaining time count the steps of this process, whatever
    was done before it resumed, and the evaluations between them.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = monotonic) -> None:
        """Show the stage `name`; `clock` tells the seconds."""
        self._name = name
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the step training resumes from."""
        if not state.is_world_process_zero:
            return
        self._first_step = self._line_step = state.global_step
        self._start = self._line_time = self._clock()
        # disable=None draws on a terminal or in a notebook only.
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._name,
            unit="step",
            disable=None,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on by one step."""
        if self._bar is None:
            return
        if not self._bar.disable:
            self._bar.update(state.global_step - self._bar.n)
        elif state.global_step < state.max_steps and self._is_line_due(state):
            self._write_line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note loss and mean score of the grid."""
        for key, label in (("loss", "loss"), ("eval_grid_mean", "grid")):
            if logs and key in logs:
                self._shown[label] = f"{logs[key]:.4g}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar, or write the last line."""
        if self._bar is not None:
            if self._bar.disable:
                self._write_line(state)
            self._bar.close()
            self._bar = None

    def _is_line_due(self, state: TrainerState) -> bool:
        if self._clock() - self._line_time < _SECONDS_BETWEEN_LINES:
            return False
        is_first = self._line_step == self._first_step
        steps = state.global_step - self._line_step
        return is_first or steps >= _SHARE_BETWEEN_LINES * state.max_steps

    def _write_line(self, state: TrainerState) -> None:
        self._line_step, self._line_time = state.global_step, self._clock()
        step, total = state.global_step, state.max_steps
        parts = [self._name, f"step {step}/{total}", f"{step / total:.0%}"]
        parts += [f"{label} {value}" for label, value in self._shown.items()]
        seconds = self._line_time - self._start
        taken = step - self._first_step
        if taken and seconds > 0:
            remaining = round((total - step) * seconds / taken)
            parts += [f"{taken / seconds:.3g} step/s", f"eta {timedelta(seconds=remaining)}"]
        print("  ".join(parts), file=sys.stderr, flush=True)
