"""The commands a report names give back what was run."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dynabert.cli import app
from dynabert.cli._reproduce import latency_command, run_commands, training_options
from dynabert.cli.train import rows_to_load
from dynabert.latency import LatencySetting
from dynabert.training.arguments import RunArguments


@pytest.fixture(autouse=True)
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()


def run_json(arguments: RunArguments, **changes: Any) -> dict[str, Any]:
    return {
        "model": "/models/my bert",
        "task": "sst2",
        "data": {"source": "/data/SST-2", "fingerprint": "0", "train_rows": 9},
        "arguments": json.loads(json.dumps(arguments.to_dict())),
        "numerics": {"threads": 2},
        **changes,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        RunArguments.preset("paper", Path("out")),
        RunArguments.preset("quick", Path("out"), widths=(1.0, 2 / 3), seed=3, bf16=False),
        RunArguments.preset(
            "reference-roberta", Path("out"), learning_rate=1e-4, rewire=False, use_cpu=True
        ),
        RunArguments.preset(
            "paper",
            Path("out"),
            stages=("width", "width-depth"),
            width_epochs=1.0,
            width_depth_learning_rate=3e-5,
            width_weights=(0.5, 0.1),
            augmented_file=Path("more rows.jsonl"),
            distillation=False,
        ),
    ],
    ids=["paper", "quick", "reference-roberta", "by stage"],
)
def test_training_command_gives_the_run_back(
    arguments: RunArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynabert.cli import train
    from dynabert.data import tasks

    begun: list[tuple[str, RunArguments]] = []

    def begin(model: str, data: Any, run: RunArguments, **options: Any) -> Any:
        begun.append((model, run))
        raise ValueError("begun")

    monkeypatch.setattr(train, "start_run", begin)
    monkeypatch.setattr(train, "check_folder", lambda *_: None)
    monkeypatch.setattr(tasks, "load_task", lambda *_, **__: None)
    training, evaluation = run_commands(run_json(arguments), Path("a run's folder"))
    command = shlex.split(training.text)
    assert command[:2] == ["dynabert", "train"]
    result = CliRunner().invoke(app, command[1:])
    assert "begun" in result.stderr
    ((model, run),) = begun
    assert model == "/models/my bert"
    assert run.output_dir == Path("a run's folder")
    for stage in arguments.stages:
        assert run.learning_rate_of(stage) == arguments.learning_rate_of(stage)
        assert run.epochs_of(stage) == arguments.epochs_of(stage)
    same = {"learning_rate", "width_learning_rate", "width_depth_learning_rate", "output_dir"}
    different = {
        name
        for name, value in run.to_dict().items()
        if value != arguments.to_dict()[name] and name not in same
    }
    assert different == set()
    assert shlex.split(evaluation.text) == [
        *("dynabert", "evaluate", "a run's folder", "--task", "sst2", "--data-dir", "/data/SST-2"),
    ]


def test_what_no_option_gives_is_said() -> None:
    run = RunArguments(Path("out"), probe_subnets=(), stages=("width",))
    _, left = training_options(run)
    assert left == ["depth_rule=None", "probe_subnets=()"]
    training, _ = run_commands(run_json(run), Path("run"))
    assert any("depth_rule=None" in note for note in training.notes)


def test_recorded_data_options_give_the_rows_back() -> None:
    run = RunArguments.preset("paper", Path("out"), importance_rows=500)
    given = {
        "train_file": "my rows.csv",
        "label_column": None,
        "text_column": "text",
        "balanced": True,
        "from_hub": False,
        "max_train_rows": rows_to_load(4000, run),
    }
    training, evaluation = run_commands(run_json(run, task="file", data_options=given), Path("run"))
    command = shlex.split(training.text)
    options = command[command.index("--task") : command.index("--output-dir")]
    assert options == [
        *("--task", "file", "--train-file", "my rows.csv", "--label-column", "", "--balanced"),
        *("--max-train-rows", "4000"),
    ]
    assert "--validation-file FILE" in evaluation.text


def test_latency_command_names_what_the_table_holds_for() -> None:
    setting = LatencySetting(
        *("here", "cpu", 2, "reference", "float32", 3, 16, "toy", {}),
        lengths="toy: 9",
        captured=True,
    )
    assert shlex.split(latency_command(Path("my run"), setting)) == [
        *("dynabert", "latency", "my run", "--batch-size", "3", "--seq-len", "16"),
        *("--threads", "2", "--device", "cpu", "--dtype", "float32", "--backend", "reference"),
        *("--lengths-from", "FILE", "--capture"),
    ]
