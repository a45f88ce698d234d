"""How the options of ``dynabert train`` become `RunArguments`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dynabert.cli import app
from dynabert.cli import train as train_verb
from dynabert.data import tasks
from dynabert.training.arguments import RunArguments

SECTIONS = ["Data", "Method", "Optimisation", "As in the original code", "Running"]
# Given in another form, or of no use on a command line.
WITHOUT_OPTION = {
    "probe_subnets",
    *(f"{s}_epochs" for s in ("teacher", "width", "width_depth", "final")),
    *(f"{s}_learning_rate" for s in ("teacher", "width", "width_depth", "final")),
    *(f"{s}_weights" for s in ("width", "width_depth")),
}
Parse = Callable[..., RunArguments]


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """``parse(*options)``: the arguments of the run that the command would begin."""
    asked: list[RunArguments] = []

    def begin(model: str, data: Any, run: RunArguments, **options: Any) -> Any:
        asked.append(run)
        raise ValueError("not in this test")

    monkeypatch.setattr(train_verb, "start_run", begin)
    monkeypatch.setattr(tasks, "load_task", lambda *args, **options: None)

    def go(*options: str) -> RunArguments:
        command = ["train", "--model", "m", "--task", "sst2", "--output-dir", str(tmp_path)]
        outcome = CliRunner().invoke(app, [*command, *options])
        assert outcome.stderr.strip().endswith("not in this test"), outcome.stderr
        return asked.pop()

    yield go
    logging.getLogger("dynabert").handlers.clear()


def parameters() -> dict[str, Any]:
    command: Any = typer.main.get_command(app)
    return {param.name: param for param in command.commands["train"].params}


def test_help_has_sections() -> None:
    text = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == SECTIONS
    data = text.partition("Data:")[2].partition("Method:")[0]
    for name in ("--model", "--task", "--train-file", "--augmented-file", "--max-length"):
        assert name in data
    unwrapped = " ".join(text.split())
    assert "Sequences per batch and process. [default: 32]" in unwrapped
    assert "count padding in the loss on hidden states. [default: no]" in unwrapped


def test_every_field_can_be_given() -> None:
    names = {field.name for field in fields(RunArguments)}
    assert names - set(parameters()) == WITHOUT_OPTION


def test_without_options_the_run_is_the_papers(parse: Parse, tmp_path: Path) -> None:
    assert parse() == RunArguments.preset("paper", tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--no-rewire", {"rewire": False}),
        ("--labels-only", {"distillation": False}),
        ("--depth-rule reference", {"depth_rule": "reference"}),
        ("--hidden-padding", {"hidden_padding": True}),
        ("--no-regression-logits", {"regression_logits": False}),
        ("--importance-batch-size 8", {"importance_batch_size": 8}),
        ("--no-group-by-length", {"group_by_length": False}),
        (
            "--subnets-per-step sampled --num-sampled 3",
            {"subnet_sampling": "sampled", "num_sampled": 3},
        ),
        ("--width-teacher full", {"width_depth_teacher": "full"}),
        ("--eval-steps 5 --save-steps 6", {"eval_steps": 5, "save_steps": 6}),
        ("--logging-steps 7", {"logging_steps": 7}),
        ("--selection-metric f1", {"selection_metric": "f1"}),
        (
            "--report-to tensorboard,wandb --run-name x",
            {"report_to": ("tensorboard", "wandb"), "run_name": "x"},
        ),
        ("--augmented-file a.csv", {"augmented_file": Path("a.csv")}),
        ("--long-texts cut", {"long_texts": "cut"}),
        ("--stages width,final", {"stages": ("width", "final")}),
        ("--widths 1,1/2 --depths 1", {"widths": (1.0, 0.5), "depths": (1.0,)}),
        (
            "--epochs width=2,final=0.5",
            {"teacher_epochs": 3.0, "width_epochs": 2.0, "final_epochs": 0.5},
        ),
        ("--learning-rate 5e-5", {"learning_rate": 5e-5, "width_learning_rate": None}),
        (
            "--learning-rate teacher=5e-5,width-depth=1e-5",
            {
                "learning_rate": 2e-5,
                "teacher_learning_rate": 5e-5,
                "width_depth_learning_rate": 1e-5,
            },
        ),
        (
            "--lambda-hidden width=0.5",
            {"width_weights": (1.0, 0.5), "width_depth_weights": (1.0, 1.0)},
        ),
        ("--cpu --no-bf16 --no-progress", {"use_cpu": True, "bf16": False, "progress": False}),
        ("--max-grad-norm 2 --num-workers 1", {"max_grad_norm": 2.0, "num_workers": 1}),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_options_reach_the_run(options: str, expected: dict[str, Any], parse: Parse) -> None:
    run = parse(*options.split())
    assert {name: getattr(run, name) for name in expected} == expected
    default = RunArguments.preset("paper", run.output_dir)
    untouched = {field.name for field in fields(RunArguments)} - set(expected)
    assert all(getattr(run, name) == getattr(default, name) for name in untouched)


def test_options_override_a_preset(parse: Parse, tmp_path: Path) -> None:
    assert parse("--preset", "reference") == RunArguments.preset("reference", tmp_path)
    options = "--preset reference --no-hidden-padding --learning-rate 3e-5 --lambda-hidden width=1"
    assert parse(*options.split()) == RunArguments.preset(
        "reference",
        tmp_path,
        hidden_padding=False,
        learning_rate=3e-5,
        width_weights=(1.0, 1.0),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--preset fast", "preset='fast', expected one of paper, reference, reference-roberta"),
        ("--learning-rate fast", "--learning-rate: 'fast', expected one number or pairs"),
        ("--depth-rule last", "depth_rule='last', expected one of paper, reference"),
        ("--eval-steps 0", "eval_steps=0, expected a finite number of at least 1"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_bad_options_are_refused_in_one_line(
    options: str, message: str, tmp_path: Path, no_leftover_handlers: None
) -> None:
    command = ["train", "--model", "m", "--task", "stdlib", "--output-dir", str(tmp_path / "run")]
    outcome = CliRunner().invoke(app, [*command, *options.split()])
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.fixture
def no_leftover_handlers() -> Iterator[None]:
    yield
    logging.getLogger("dynabert").handlers.clear()
