"""Two processes that are killed agree on the checkpoint to go on from, and reach the same bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertTokenizer, TrainerCallback, TrainingArguments

from dynabert import DynaBertForSequenceClassification, subnet_grid
from dynabert.data.collators import DynamicPadCollator, encode
from dynabert.training import DynaBertTrainer, Stage
from dynabert.training.checkpoint import newest_complete_checkpoint
from dynabert.training.processes import leave_processes
from dynabert.training.resumable_trainer import SaveEvery
from tests.training.conftest import tiny_config, toy_examples
from tests.training.killed_runs import digest

STAGE = Stage("final", tuple(subnet_grid((1, 0.5), (1, 0.5))), subnet_sampling="sampled")


class Killed(TrainerCallback):
    """Kills the process when a step begins."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def _train(rank: int, port: int, folder: Path, tokenizer_dir: Path, killed_at: int) -> None:
    """Ten steps of one process of two."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    tokenizer = BertTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(5)
    model = DynaBertForSequenceClassification(
        tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    )
    trainer = DynaBertTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            learning_rate=5e-3,
            logging_steps=3,
            save_strategy="epoch",
            save_total_limit=2,
            disable_tqdm=True,
            report_to="none",
            ddp_find_unused_parameters=False,
        ),
        stage=STAGE,
        problem="classification",
        train_dataset=encode(toy_examples(80, seed=1), tokenizer, 24),
        data_collator=DynamicPadCollator(tokenizer),
        callbacks=[SaveEvery(2), Killed(killed_at)],
    )
    trainer.train(resume_from_checkpoint=True)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save((str(trainer.resumed_from), losses), folder / "outcome.pt")
    leave_processes()


def train(port: int, folder: Path, tokenizer_dir: Path, killed_at: int = -1) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_train, args=(rank, port, folder, tokenizer_dir, killed_at))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ended = -signal.SIGKILL if killed_at >= 0 else 0
    assert [process.exitcode for process in processes] == [ended, ended]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_killed_processes_go_on_to_the_bits_of_two_that_were_not(
    tokenizer: Any, tmp_path: Path, free_port: int
) -> None:
    tokenizer.save_pretrained(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(free_port, whole, tmp_path)
    train(free_port, killed, tmp_path, killed_at=7)
    assert newest_complete_checkpoint(killed) == killed / "checkpoint-6"
    (killed / "checkpoint-6" / "rng_state_1.pth").unlink()
    train(free_port, killed, tmp_path)
    last = "checkpoint-10/model.safetensors"
    assert digest(killed / last) == digest(whole / last)
    resumed_from, losses = torch.load(killed / "outcome.pt", weights_only=True)
    assert resumed_from == str(killed / "checkpoint-5")
    assert losses == torch.load(whole / "outcome.pt", weights_only=True)[1]
