"""Logs in experiment trackers, with stand-ins for what they install: one log for each stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers.integrations import integration_utils

from dynabert import DynaBertForSequenceClassification
from dynabert.data.examples import TaskData
from dynabert.training import RunArguments, run_stages
from dynabert.training.reporting import check_integrations, stage_reports

Train = Callable[..., Path]


@pytest.fixture
def train(
    make_model: Callable[..., DynaBertForSequenceClassification],
    make_data: Callable[..., TaskData],
    tokenizer: Any,
    tmp_path: Path,
) -> Train:
    """``train(**changes)``: a short run of the stages width and final; its folder."""
    make_model().save_pretrained(tmp_path / "model")

    def go(**changes: Any) -> Path:
        settings: dict[str, Any] = {
            "stages": ("width", "final"),
            "widths": (1.0, 0.5),
            "depths": (1.0,),
            "width_epochs": 1,
            "final_epochs": 1,
            "batch_size": 16,
            "max_length": 24,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 2,
            "progress": False,
            **changes,
        }
        run = RunArguments(tmp_path / "run", **settings)
        run_stages(tmp_path / "model", make_data(), tokenizer, run)
        return tmp_path / "run"

    return go


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    made: list[Writer]

    def __init__(self, log_dir: str) -> None:
        self.log_dir = Path(log_dir)
        self.scalars: dict[str, list[int]] = {}
        self.is_closed = False
        Writer.made.append(self)

    def add_text(self, *args: Any) -> None:
        pass

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, []).append(step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(Writer, "made", [], raising=False)


@pytest.mark.usefixtures("tensorboard")
def test_every_stage_has_its_own_tensorboard_log(train: Train) -> None:
    folder = train(report_to=("tensorboard",))
    assert [writer.log_dir for writer in Writer.made] == [
        folder / "logs" / "width",
        folder / "logs" / "final",
    ]
    for writer in Writer.made:
        assert writer.is_closed
        assert writer.scalars["train/loss"] == [2, 4]
        assert writer.scalars["train/loss_w0.5-d1"] == [2, 4]
        assert writer.scalars["eval/grid_mean"] == [4]


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_folder_of_the_environment_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    (callback,) = stage_reports(("tensorboard",), tmp_path / "run" / "logs" / "width")
    assert callback.logging_dir == str(tmp_path / "all" / "width")  # type: ignore[attr-defined]


class Config(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class Wandb(ModuleType):
    """Stands for wandb, which has one open log in a process."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.run: Any = None
        self.logs: dict[str, list[dict[str, float]]] = {}

    def init(self, *, project: str, name: str) -> None:
        self.run = SimpleNamespace(_label=lambda **labels: None, summary={}, name=name)
        self.config = Config()
        self.logs[name] = []

    def log(self, values: dict[str, float]) -> None:
        self.logs[self.run.name].append(values)

    def finish(self) -> None:
        self.run = None


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    config_util: Any = ModuleType("wandb.sdk.lib.config_util")
    config_util.ConfigError = ValueError
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", config_util)
    return module


@pytest.mark.parametrize(("run_name", "prefix"), [(None, "run"), ("sst2", "sst2")])
def test_every_stage_has_its_own_wandb_log(
    run_name: str | None, prefix: str, train: Train, wandb: Wandb
) -> None:
    train(report_to=("wandb",), run_name=run_name)
    assert list(wandb.logs) == [f"{prefix}-width", f"{prefix}-final"]
    for entries in wandb.logs.values():
        steps = [entry["train/global_step"] for entry in entries if "train/loss" in entry]
        assert steps == [2, 4]
    assert wandb.run is None


def test_integration_that_is_not_installed_is_refused_before_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"report_to='wandb', expected one of .* Install what it"):
        train(report_to=("wandb",))
    assert not (tmp_path / "run").exists()


def test_unknown_integration_is_refused() -> None:
    with pytest.raises(ValueError, match="report_to='slate', expected one of"):
        check_integrations(("slate",))


def test_nothing_is_reported_unless_asked_for(tmp_path: Path) -> None:
    check_integrations(())
    assert stage_reports((), tmp_path) == []
