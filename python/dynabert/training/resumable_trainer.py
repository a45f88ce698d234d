"""`ResumableTrainer`: killed at any instant, it goes on to the bits it was heading for.

Stands on `checkpoint`, which keeps the folders; `trainer` inherits from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from dynabert.durable import remove_leftovers, staged_name
from dynabert.json_file import read_json, write_json
from dynabert.training.checkpoint import (
    checkpoint_name,
    commit_checkpoint,
    find_damage,
    newest_complete_checkpoint,
    num_processes_of,
    rotate_checkpoints,
)

_SCHEMA = 1


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent, and hold all that the next step depends on.

    A checkpoint is written into a hidden folder, by every process; once all have done so, the first
    one writes it through to the disk and renames it, and only then are older ones removed: but for
    the `save_total_limit` newest whole ones, and the best model of each. To what the Trainer saves
    it adds the state of the log, so that a resumed run logs what it would have logged.

    Attributes:
        resumed_from: The checkpoint that the last `train` went on from; None if it began anew.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumed_from: Path | None = None
        self._staging: Path | None = None
        self.add_callback(_Resumption(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as the Trainer does, but resume from whole checkpoints only.

        Args:
            resume_from_checkpoint: True: the newest undamaged checkpoint in ``args.output_dir``, or
                from the start if there is none; damaged ones are named in warnings. Or the path of
                a checkpoint in that folder.
            trial: As for the Trainer.
            ignore_keys_for_eval: As for the Trainer.

        Raises:
            ValueError: The checkpoint named is damaged or elsewhere, or it was written by another
                number of processes, whose random states and batches are not those of this call.
            FloatingPointError: A weight is not finite when a checkpoint is due; it is not written.
        """
        self.resumed_from = self._choose(resume_from_checkpoint)
        checkpoint = str(self.resumed_from) if self.resumed_from else None
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def log_state(self) -> dict[str, Any]:
        """What this process has gathered for the next line of the log, as JSON values.

        A subclass that gathers more adds to it, and overrides `load_log_state` too.
        """
        return {
            "loss_sum": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
        }

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Go on gathering from what `log_state` returned."""
        self._tr_loss.fill_(state["loss_sum"])
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged_step"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with a ``train_loss`` over all steps, resumed or not."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one optimiser step; none once training is complete.

        Resumed from its last checkpoint in the middle of an epoch, the Trainer would take one more
        step before it notices.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            return [], None
        samples: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        return samples

    def _choose(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to resume from: the first process looks, all others are told."""
        checkpoint: Path | None = None
        problem: str | None = None
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            remove_leftovers(folder)
            if asked is True:
                checkpoint = newest_complete_checkpoint(folder)
            elif asked:
                checkpoint = Path(asked)
                problem = find_damage(checkpoint)
                if checkpoint.resolve().parent != folder.resolve():
                    problem = f"it is not in output_dir={str(folder)!r}"
            if checkpoint and problem is None:
                written_by = num_processes_of(checkpoint)
                if written_by != self.args.world_size:
                    problem = (
                        f"{written_by} processes wrote it, and this call has {self.args.world_size}"
                    )
        choice = [checkpoint, problem]
        if self.args.world_size > 1:
            distributed.broadcast_object_list(choice, device=self.args.device)
        checkpoint, problem = cast("tuple[Path | None, str | None]", choice)
        if problem:
            raise ValueError(
                f"{type(self).__name__}: cannot resume from {checkpoint}: {problem}. Start as the "
                "former call was started, from an undamaged checkpoint."
            )
        return checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_weights()
        folder = Path(str(self.args.output_dir))
        name = checkpoint_name(self.state.global_step)
        # The Trainer puts its folder into this one, and finds none to rotate there.
        self._staging = staged_name(folder / "saving")
        staged = self._staging / name
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        write_json(staged / self._log_file, {"schema": _SCHEMA, **self.log_state()})
        best = checkpoint_name(self.state.best_global_step or 0)
        has_best = best == name or (folder / best).is_dir()
        if has_best:
            self.state.best_model_checkpoint = str(folder / best)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            commit_checkpoint(
                staged,
                folder / name,
                best=best if has_best else None,
                num_processes=self.args.world_size,
            )
            staged.parent.rmdir()
            if self.args.save_total_limit:
                rotate_checkpoints(folder, self.state.global_step, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    @property
    def _log_file(self) -> str:
        return f"log_state_{self.args.process_index}.json"

    def _check_weights(self) -> None:
        """Keep what is beyond repair from replacing the last good checkpoint."""
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            values = parameter.detach()
            if isinstance(values, DTensor):
                values = values.to_local()
            if not values.isfinite().all():
                raise FloatingPointError(
                    f"{type(self).__name__}: {name} is not finite after step "
                    f"{self.state.global_step}, expected finite weights. No checkpoint was "
                    "written, the last one stays; lower learning_rate, or check the data."
                )


class _Resumption(TrainerCallback):
    """Puts back what the Trainer resets when it resumes."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._is_complete = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the state of the log, and find the best checkpoint where the run is now."""
        checkpoint = self._trainer.resumed_from
        self._is_complete = state.global_step >= state.max_steps
        if checkpoint is None:
            return
        record = read_json(checkpoint / self._trainer._log_file, schema=_SCHEMA)
        self._trainer.load_log_state(record)
        best = checkpoint.with_name(checkpoint_name(state.best_global_step or 0))
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing is due after no step."""
        if self._is_complete:
            control.should_log = control.should_evaluate = control.should_save = False


class SaveEvery(TrainerCallback):
    """Asks for a checkpoint every `save_steps` optimiser steps, beside the Trainer's own strategy.

    Not at the end of an epoch that is evaluated and saved as a whole: resumed from a checkpoint
    between the last step and the evaluation, the run would never make that evaluation.
    """

    def __init__(self, save_steps: int) -> None:
        self._save_steps = save_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint when one is due."""
        ends_epoch = control.should_training_stop or float(state.epoch).is_integer()
        if ends_epoch and args.save_strategy == SaveStrategy.EPOCH:
            return
        if state.global_step % self._save_steps == 0:
            control.should_save = True
