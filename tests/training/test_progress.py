"""What a stage shows on stderr, under a clock that the test sets."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from dynabert.training.progress import StageProgress


class Stage:
    """A stage of `max_steps`, each of which takes `seconds`."""

    def __init__(self, max_steps: int, *, first_step: int = 0, is_first_process: bool = True):
        self.now = 1000.0
        self.callback = StageProgress("width", clock=lambda: self.now)
        self.state = TrainerState(
            global_step=first_step, max_steps=max_steps, is_world_process_zero=is_first_process
        )
        self.tell("on_train_begin")

    def tell(self, event: str, **details: Any) -> None:
        args: Any = None
        getattr(self.callback, event)(args, self.state, TrainerControl(), **details)

    def take(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.now += seconds
            self.state.global_step += 1
            self.tell("on_step_end")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\r" not in captured.err
    return captured.err.splitlines()


def test_first_line_comes_after_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(1250)
    stage.take(19, 0.5)
    assert lines(capsys) == []
    stage.tell("on_log", logs={"loss": 1.23449, "loss_w1-d1": 0.1})
    stage.take(1, 0.5)
    assert lines(capsys) == ["width  step 20/1250  2%  loss 1.234  2 step/s  eta 0:10:15"]


def test_lines_are_a_twentieth_of_the_steps_apart(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(1000)
    stage.take(300, 1.0)
    steps = [line.split()[2] for line in lines(capsys)]
    assert steps == ["10/1000", "60/1000", "110/1000", "160/1000", "210/1000", "260/1000"]


def test_lines_are_ten_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(20)
    stage.take(15, 4.0)
    steps = [line.split()[2] for line in lines(capsys)]
    assert steps == ["3/20", "6/20", "9/20", "12/20", "15/20"]


def test_rate_counts_the_steps_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(1250, first_step=1000)
    stage.take(50, 2.0)
    shown = lines(capsys)
    assert shown[0] == "width  step 1005/1250  80%  0.5 step/s  eta 0:08:10"
    stage.tell("on_log", logs={"eval_grid_mean": 0.8512})
    stage.now += 400.0  # an evaluation
    stage.take(50, 2.0)
    assert "width  step 1068/1250  85%  grid 0.8512  0.127 step/s  eta 0:23:55" in lines(capsys)


def test_last_line_is_the_end_of_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(40)
    stage.take(40, 0.1)
    assert lines(capsys) == []
    stage.tell("on_log", logs={"eval_grid_mean": 0.5})
    stage.tell("on_train_end")
    assert lines(capsys) == ["width  step 40/40  100%  grid 0.5  10 step/s  eta 0:00:00"]
    stage.take(1, 60.0)
    assert lines(capsys) == []


def test_a_stage_without_steps_left_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(40, first_step=40)
    stage.tell("on_train_end")
    assert lines(capsys) == ["width  step 40/40  100%"]


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(40, is_first_process=False)
    stage.take(40, 60.0)
    stage.tell("on_train_end")
    assert lines(capsys) == []


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    stage = Stage(8, first_step=2)
    stage.tell("on_log", logs={"loss": 0.25, "eval_grid_mean": 0.5})
    stage.take(6, 60.0)
    stage.tell("on_train_end")
    drawn = terminal.getvalue().split("\r")
    assert drawn[1].startswith("width:  25%")
    assert "8/8" in drawn[-1]
    assert "loss=0.25" in drawn[-1] and "grid=0.5" in drawn[-1]
    assert "step/s" in drawn[-1] or "s/step" in drawn[-1]
