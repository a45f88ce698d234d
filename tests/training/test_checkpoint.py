"""Damaged checkpoints are named and passed over; training goes on to the same bits and log."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from dynabert import DynaBertForSequenceClassification, subnet_grid
from dynabert.data.collators import DynamicPadCollator, encode
from dynabert.evaluation import evaluate_grid
from dynabert.training import DynaBertTrainer, Stage
from dynabert.training.checkpoint import (
    checkpoint_name,
    commit_checkpoint,
    find_damage,
    newest_complete_checkpoint,
    rotate_checkpoints,
)
from dynabert.training.resumable_trainer import SaveEvery
from tests.training.conftest import SENTIMENT, tiny_config, toy_examples

SUBNETS = tuple(subnet_grid((1, 0.5, 0.25), (1, 0.5)))
STAGE = Stage("final", SUBNETS, subnet_sampling="sampled", num_sampled=1)
STEPS_PER_EPOCH = 5
MakeTrainer = Callable[..., DynaBertTrainer]


class Interruption(Exception):
    """Stands for whatever ends a process."""


class Stop(TrainerCallback):
    """Ends training when a step begins."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise Interruption


@pytest.fixture(scope="module")
def make_trainer(tokenizer: Any) -> MakeTrainer:
    """``make_trainer(folder, *callbacks, save_steps=2, **settings)``: three epochs of five steps,
    with dropout; a checkpoint at each end of an epoch and every two steps."""
    collator = DynamicPadCollator(tokenizer)
    rows = encode(toy_examples(8 * STEPS_PER_EPOCH, seed=1), tokenizer, 24)
    validation = encode(toy_examples(40, seed=2), tokenizer, 24)

    def evaluator(model: Any) -> Any:
        return evaluate_grid(model, validation, collator, SENTIMENT, SUBNETS[:2], progress=False)

    def make(
        folder: Path, *callbacks: TrainerCallback, save_steps: int = 2, **changes: Any
    ) -> DynaBertTrainer:
        torch.manual_seed(5)
        model = DynaBertForSequenceClassification(
            tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        )
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 3,
            "learning_rate": 5e-3,
            "logging_steps": 3,
            "logging_nan_inf_filter": False,
            "save_strategy": "epoch",
            "save_total_limit": 2,
            "eval_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_grid_mean",
            "disable_tqdm": True,
            "report_to": "none",
        }
        score = changes.pop("evaluator", evaluator)
        return DynaBertTrainer(
            model,
            TrainingArguments(**{**settings, **changes}),
            stage=STAGE,
            problem="classification",
            train_dataset=rows,
            data_collator=collator,
            evaluator=score,
            callbacks=[SaveEvery(save_steps), *callbacks],
        )

    return make


@dataclass(frozen=True)
class Outcome:
    """What a training ends with: weights of the best epoch, and the log without times."""

    weights: dict[str, Tensor]
    log: list[dict[str, float]]

    def check_equals(self, other: Outcome) -> None:
        assert self.log == other.log
        assert set(self.weights) == set(other.weights)
        for name, value in other.weights.items():
            assert torch.equal(self.weights[name], value), name


def outcome(trainer: DynaBertTrainer) -> Outcome:
    times = ("_seconds", "_runtime", "_per_second")
    log = [
        {key: value for key, value in entry.items() if not key.endswith(times)}
        for entry in trainer.state.log_history
    ]
    assert trainer.model is not None
    return Outcome(dict(trainer.model.state_dict()), log)


@pytest.fixture(scope="module")
def uninterrupted(make_trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.set_num_threads(1)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 5
    return outcome(trainer)


@pytest.fixture(scope="module")
def left(make_trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves that is stopped in its ninth step: checkpoints 8, 6, and the best."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("left") / "checkpoints"
    with pytest.raises(Interruption):
        make_trainer(folder, Stop(8)).train()
    assert sorted(path.name for path in folder.iterdir()) == [
        f"checkpoint-{step}" for step in (5, 6, 8)
    ]
    return folder


@pytest.fixture
def folder(left: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    shutil.copytree(left, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[:-1])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return damage


def set_manifest(text: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / "manifest.json").write_text(text) and None


def unreadable(name: str) -> Callable[[Path], None]:
    """A folder in a file's place: it is there, and reading it is an error, for any user."""

    def damage(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return damage


DAMAGES = {
    **{
        f"no-{name}": (remove(name), f"{name} is missing")
        for name in (
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "model.safetensors",
            "trainer_state.json",
            "log_state_0.json",
            "manifest.json",
        )
    },
    "truncated": (truncate("model.safetensors"), "model.safetensors has "),
    "flipped-weights": (flip("model.safetensors"), "model.safetensors has another SHA-256"),
    "flipped-optimiser": (flip("optimizer.pt"), "optimizer.pt has another SHA-256"),
    "unreadable-manifest": (unreadable("manifest.json"), "manifest.json cannot be read"),
    "unreadable-weights": (unreadable("model.safetensors"), "model.safetensors is missing"),
    "no-json": (set_manifest("{"), "manifest.json cannot be read"),
    "other-schema": (set_manifest('{"schema": 1}'), "manifest.json cannot be read"),
    "no-files": (set_manifest('{"schema": 2}'), "manifest.json cannot be read"),
    "no-hashes": (
        set_manifest('{"schema": 2, "best": null, "num_processes": 1, "files": {"a": 3}}'),
        "manifest.json cannot be read",
    ),
    "nothing-needed": (
        set_manifest('{"schema": 2, "best": null, "num_processes": 1, "files": {}}'),
        "it was saved without weights",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], None], message: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_complete_checkpoint(folder) == folder / "checkpoint-8"
    assert not caplog.records
    damage(folder / "checkpoint-8")
    assert newest_complete_checkpoint(folder) == folder / "checkpoint-6"
    (warning,) = caplog.messages
    assert warning.startswith(f"checkpoint-8 in {folder}: {message}")
    assert warning.endswith("; going on from checkpoint-6")


def test_every_damaged_checkpoint_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    remove("optimizer.pt")(folder / "checkpoint-8")
    flip("rng_state.pth")(folder / "checkpoint-6")
    assert newest_complete_checkpoint(folder) == folder / "checkpoint-5"
    assert [text.partition(" ")[0] for text in caplog.messages] == ["checkpoint-8", "checkpoint-6"]
    assert all(text.endswith("; going on from checkpoint-5") for text in caplog.messages)
    caplog.clear()
    remove("manifest.json")(folder / "checkpoint-5")
    assert newest_complete_checkpoint(folder) is None
    assert len(caplog.messages) == 3
    assert all(text.endswith("; starting anew") for text in caplog.messages)


def test_a_checkpoint_needs_the_best_weights_it_refers_to(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = folder / "checkpoint-5"
    remove("optimizer.pt")(best)
    assert find_damage(best) is not None
    assert newest_complete_checkpoint(folder) == folder / "checkpoint-8"
    flip("model.safetensors")(best)
    assert newest_complete_checkpoint(folder) is None
    assert (
        "the best weights so far are lost, as in checkpoint-5 model.safetensors has another"
        in (caplog.messages[0])
    )


@pytest.mark.parametrize(
    ("damaged", "resumed"),
    [((), 8), ((8,), 6), ((8, 6), 5), ((8, 6, 5), None)],
    ids=["none", "newest", "two", "all"],
)
def test_training_goes_on_to_the_same_bits_and_log(
    damaged: tuple[int, ...],
    resumed: int | None,
    folder: Path,
    make_trainer: MakeTrainer,
    uninterrupted: Outcome,
) -> None:
    for step in damaged:
        remove("optimizer.pt")(folder / f"checkpoint-{step}")
    # What a process leaves that dies while it saves or removes a checkpoint.
    shutil.copytree(folder / "checkpoint-5", folder / ".saving.staged" / "checkpoint-9")
    shutil.copytree(folder / "checkpoint-5", folder / ".checkpoint-4.former")
    torch.manual_seed(99)
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.resumed_from == (folder / f"checkpoint-{resumed}" if resumed else None)
    outcome(trainer).check_equals(uninterrupted)
    best = trainer.state.best_global_step
    assert best is not None
    kept = {path.name for path in folder.iterdir()}
    # The best before the last epoch may be another one.
    assert {checkpoint_name(step) for step in (best, 14, 15)} <= kept
    assert len(kept) <= 4 and not [name for name in kept if name.startswith(".")]


@pytest.mark.parametrize(
    "stops",
    [(3,), (4, 5, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((9, 10, 11), (12, 14)))],
    ids=str,
)
def test_training_can_be_stopped_again_and_again(
    stops: tuple[int, ...], make_trainer: MakeTrainer, uninterrupted: Outcome, tmp_path: Path
) -> None:
    for step in stops:
        with pytest.raises(Interruption):
            make_trainer(tmp_path, Stop(step)).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    outcome(trainer).check_equals(uninterrupted)


def test_the_best_checkpoint_is_named_where_it_is_and_found_where_it_was_moved(
    folder: Path, make_trainer: MakeTrainer, uninterrupted: Outcome, tmp_path: Path
) -> None:
    with pytest.raises(Interruption):
        make_trainer(folder, Stop(10)).train(resume_from_checkpoint=True)
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / f"checkpoint-{state['best_global_step']}")
    moved = folder.rename(tmp_path / "moved")
    trainer = make_trainer(moved, Stop(10))
    with pytest.raises(Interruption):
        trainer.train(resume_from_checkpoint=True)
    best = moved / f"checkpoint-{state['best_global_step']}"
    assert trainer.state.best_model_checkpoint == str(best)
    trainer = make_trainer(moved)
    trainer.train(resume_from_checkpoint=True)
    outcome(trainer).check_equals(uninterrupted)


def test_there_is_no_checkpoint_between_the_last_step_of_an_epoch_and_its_evaluation(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    def stopped(model: Any) -> Any:
        raise Interruption

    with pytest.raises(Interruption):
        make_trainer(tmp_path, save_steps=STEPS_PER_EPOCH, evaluator=stopped).train()
    assert newest_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("num_epochs", [0.6, 1.4, 2])
def test_a_complete_training_is_not_trained_further(
    num_epochs: float, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=num_epochs)
    trainer.train()
    saved = sorted(tmp_path.rglob("*"))
    again = make_trainer(tmp_path, Stop(trainer.state.max_steps), num_train_epochs=num_epochs)
    again.train(resume_from_checkpoint=True)
    outcome(again).check_equals(outcome(trainer))
    assert sorted(tmp_path.rglob("*")) == saved


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    make_trainer: MakeTrainer, uninterrupted: Outcome, tmp_path: Path
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                with torch.no_grad():
                    kwargs["model"].classifier.weight[0, 0] = float("inf")

    with pytest.raises(FloatingPointError, match="step 8"):
        make_trainer(tmp_path, Poison()).train()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    outcome(trainer).check_equals(uninterrupted)


def test_weights_that_are_not_finite_are_not_saved(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                with torch.no_grad():
                    kwargs["model"].classifier.weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"classifier\.weight is not finite after step 8"):
        make_trainer(tmp_path, Poison()).train()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_a_checkpoint_can_be_named(
    folder: Path, make_trainer: MakeTrainer, uninterrupted: Outcome, tmp_path: Path
) -> None:
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert trainer.resumed_from == folder / "checkpoint-6"
    outcome(trainer).check_equals(uninterrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: remove("scheduler.pt")(path), r"checkpoint-8: scheduler\.pt is missing"),
        (
            lambda path: set_manifest(
                (path / "manifest.json")
                .read_text()
                .replace('"num_processes": 1', '"num_processes": 2')
            )(path),
            "2 processes wrote it, and this call has 1",
        ),
        (
            lambda path: path.parent.rename(path.parents[1] / "elsewhere"),
            "manifest.json is missing",
        ),
    ],
    ids=["damaged", "processes", "absent"],
)
def test_a_named_checkpoint_that_will_not_do_is_refused(
    change: Callable[[Path], Any], message: str, folder: Path, make_trainer: MakeTrainer
) -> None:
    change(folder / "checkpoint-8")
    trainer = make_trainer(folder, Stop(0))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_a_checkpoint_elsewhere_is_refused(
    folder: Path, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "other", Stop(0))
    with pytest.raises(ValueError, match="it is not in output_dir"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_another_number_of_processes_is_refused(folder: Path, make_trainer: MakeTrainer) -> None:
    for manifest in folder.glob("*/manifest.json"):
        manifest.write_text(
            manifest.read_text().replace('"num_processes": 1', '"num_processes": 4')
        )
    with pytest.raises(ValueError, match=r"checkpoint-8: 4 processes wrote it"):
        make_trainer(folder, Stop(0)).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_optimiser_is_not_resumed_from(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, num_train_epochs=1, save_only_model=True).train()
    assert newest_complete_checkpoint(tmp_path) is None
    assert all("it was saved without optimiser state" in text for text in caplog.messages)
    assert len(caplog.messages) == 2


def fake_checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    staged = folder / f".{step}.staged"
    staged.mkdir(parents=True)
    for name in (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ):
        (staged / name).write_text(f"{name} {step}")
    checkpoint = folder / checkpoint_name(step)
    name_of_best = None if best is None else checkpoint_name(best)
    commit_checkpoint(staged, checkpoint, best=name_of_best, num_processes=1)
    return checkpoint


def test_rotation_keeps_the_newest_whole_ones_and_their_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, best in ((2, None), (5, 5), (6, 5), (10, 5), (12, 12), (14, 12), (30, 5)):
        fake_checkpoint(tmp_path, step, best)
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    caplog.set_level(logging.INFO)
    rotate_checkpoints(tmp_path, step=14, keep=2)
    kept = {path.name for path in tmp_path.iterdir()}
    # 12 is damaged but holds the best weights of 14; 10 refers to 5; 30 is of a former attempt.
    assert kept == {
        *(checkpoint_name(step) for step in (5, 10, 12, 14)),
        "checkpoint-notes",
        "checkpoint-99",
    }
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-14"


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    remove("optimizer.pt")(fake_checkpoint(tmp_path, 4))
    assert find_damage(fake_checkpoint(tmp_path, 4)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
