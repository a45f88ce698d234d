"""`dynabert train` as torchrun and accelerate launch it, in two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch

from dynabert import DynaBertModel
from tests.training.conftest import SENTIMENT, toy_examples

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "{port}"),
)
FSDP2 = (
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"),
    str(Path(__file__).with_name("sharded_on_cpu.py")),
)
FAILING = """
from dynabert.cli import app
from dynabert.training import DynaBertTrainer

step = DynaBertTrainer.training_step

def failing(self, *args, **kwargs):
    if self.state.global_step == 3 and self.args.process_index == 1:
        raise RuntimeError("only here")
    return step(self, *args, **kwargs)

DynaBertTrainer.training_step = failing
app(prog_name="dynabert")
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def launch(free_port: int) -> Callable[..., Outcome]:
    """``launch(*arguments)``: Python with these arguments, bounded in time."""

    def run(*arguments: str | Path) -> Outcome:
        process = subprocess.Popen(
            [sys.executable, *(str(argument).format(port=free_port) for argument in arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Outcome(process.returncode, out, err)

    return run


@pytest.fixture
def train(
    make_encoder: Callable[..., DynaBertModel], tokenizer: Any, tmp_path: Path
) -> Callable[..., tuple[str, ...]]:
    """``train(run, stages, batch_size)``: the arguments that train a tiny model on own files."""
    model_dir = tmp_path / "bert"
    make_encoder(seed=4).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    for name, count in (("train", 71), ("dev", 20)):  # 7 rows of 71 are for importance
        with (tmp_path / f"{name}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["text", "label"])
            for example in toy_examples(count, seed=len(name)):
                rows.writerow([example.text, SENTIMENT.label_names[int(example.label or 0)]])

    def arguments(run: str, stages: str, batch_size: int) -> tuple[str, ...]:
        return (
            *("train", "--model", str(model_dir), "--output-dir", str(tmp_path / run)),
            *("--task", "file", "--train-file", str(tmp_path / "train.csv")),
            *("--validation-file", str(tmp_path / "dev.csv"), "--stages", stages),
            *("--widths", "1,0.5", "--depths", "1,0.5", "--importance-batch-size", "7"),
            *("--epochs", "1", "--learning-rate", "1e-3", "--batch-size", str(batch_size)),
            *("--cpu", "--no-bf16", "--save-steps", "1", "--logging-steps", "1"),
        )

    return arguments


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = (safetensors.torch.load_file(p / "model.safetensors") for p in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = (ours[name] - tensor).abs()
        if name.endswith("qkv_bias"):
            # The keys' bias changes nothing, so its gradient is rounding, which Adam blows up.
            difference[:, 1] = 0
        assert float(difference.max()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_launched_processes_train_what_one_would(
    launch: Callable[..., Outcome], train: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    alone, together, sharded = (tmp_path / name for name in ("alone", "together", "sharded"))
    assert launch("-m", "dynabert", *train("alone", "teacher,final", 8)).code == 0

    # What stops one process stops the other too, and loses nothing that was saved.
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    failed = launch(*TORCHRUN, script, *train("together", "teacher", 4))
    assert failed.code != 0 and "only here" in failed.err and failed.out == ""
    done = launch(*TORCHRUN, "-m", "dynabert", *train("together", "teacher", 4))
    assert done.code == 0, done.err
    record = json.loads((together / "teacher" / "stage.json").read_text())
    assert record["resumed_from"] == "checkpoint-3" and record["steps"] == 8
    assert_same_weights(together / "teacher", alone / "teacher")

    # Another launcher goes on with the run.
    done = launch(
        *ACCELERATE, "--multi_gpu", "-m", "dynabert", *train("together", "teacher,final", 4)
    )
    assert done.code == 0, done.err
    assert_same_weights(together / "final", alone / "final")
    assert done.out.count("The model is in") == 1
    assert done.err.count("dynabert: stage teacher is finished") == 1
    assert sorted(path.name for path in together.iterdir()) == sorted(
        path.name for path in alone.iterdir()
    )
    grids = [json.loads((run / "grid.json").read_text()) for run in (together, alone)]
    assert grids[0] == grids[1]

    refused = launch(*TORCHRUN, "-m", "dynabert", *train("together", "final", 4), "--seed", "1")
    assert refused.code != 0 and "holds a run with another" in refused.err

    done = launch(*ACCELERATE, *FSDP2, *train("sharded", "teacher,final", 4))
    assert done.code == 0, done.err
    assert done.out.count("The model is in") == 1
    for stage in ("teacher", "final"):
        assert_same_weights(sharded / stage, alone / stage)
