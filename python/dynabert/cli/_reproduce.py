"""The commands that made a run, and its latencies, written so that they can be repeated.

``run.json`` records values, not a command. The command is put together from them and read back by
the parser of ``dynabert train``; what it does not give back is said in a note.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dynabert.report import format_fraction
from dynabert.report_page import Command
from dynabert.training.arguments import LABEL_FREE_STAGES, RunArguments
from dynabert.training.presets import PRESET_NAMES, PresetName

if TYPE_CHECKING:
    from dynabert.latency_table import LatencySetting

# Written as one option for several stages, or in another way.
_BY_STAGE = ("epochs", "learning_rate", "weights")
_FLAGS = ("--from-hub", "--balanced")
# What the user watches a run with.
_UNIMPORTANT = ("output_dir", "progress", "report_to", "run_name")


def run_commands(run: Mapping[str, Any], place: Path) -> tuple[Command, ...]:
    """The training command of a run and the one that scores it.

    Args:
        run: Contents of ``run.json``.
        place: Folder of the run, as it was given.
    """
    data, notes = data_options(run)
    options, left = training_options(RunArguments.from_dict(run["arguments"]))
    command = ["dynabert", "train", "--model", str(run["model"]), *_typed(data)]
    command += ["--output-dir", str(place), *options]
    threads = run.get("numerics", {}).get("threads")
    if threads is not None:
        command += ["--threads", str(threads)]
    if left:
        notes.append(f"No option of the command gives {', '.join(left)}.")
    notes.append("With a finished run in that folder the command only reports it; name another.")
    scored, scored_notes = _to_evaluate(data)
    evaluate = ["dynabert", "evaluate", str(place), *_typed(scored)]
    return (
        Command("Training", shlex.join(command), tuple(notes)),
        Command("Scores of every subnet", shlex.join(evaluate), scored_notes),
    )


def latency_command(place: Path, setting: LatencySetting) -> str:
    """The command that measures a table again; FILE stands for the texts that lengths are of."""
    options = _setting_options(setting)
    options += ["--lengths-from", "FILE"] if setting.lengths else []
    options += ["--capture"] if setting.captured else []
    return shlex.join(["dynabert", "latency", str(place), *options])


def pick_command(place: Path, setting: LatencySetting) -> str:
    """The command that picks from a table, without budget and percentile; "" where it cannot."""
    if setting.lengths or setting.captured:
        return ""
    return shlex.join(["dynabert", "pick", str(place), *_setting_options(setting)])


def _setting_options(setting: LatencySetting) -> list[str]:
    options = ["--batch-size", str(setting.batch_size), "--seq-len", str(setting.seq_len)]
    options += ["--threads", str(setting.threads), "--device", setting.device]
    options += ["--dtype", setting.dtype]
    if not setting.backend.startswith("auto"):
        options += ["--backend", setting.backend]
    return options


def data_options(run: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The options that name the data, with their values ("" of a flag), and what they leave open.

    A ``run.json`` without the options that were given tells where the rows came from, and no more.
    """
    task, data = str(run["task"]), run["data"]
    given = run.get("data_options")
    if given:
        return {"--task": task, **_recorded(given, run)}, []
    source = str(data["source"])
    open_ends = [
        f"{data['train_rows']:,} rows were read to train on; if the data has more, add "
        "--max-train-rows."
    ]
    if task == "stdlib":
        return {"--task": task}, open_ends
    if task == "file":
        open_ends.append(f"The rows came from {source}; add the names of unusual columns.")
        return {"--task": task, "--train-file": source.split(", ")[0]}, open_ends
    if source.startswith("nyu-mll/glue"):
        return {"--task": task, "--from-hub": ""}, open_ends
    return {"--task": task, "--data-dir": source}, open_ends


def _recorded(given: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    """The options for what `load_task` was given, without those that are as by default."""
    defaults = {"text_column": "text", "label_column": "label", "problem": "auto"}
    options = {}
    for name, value in given.items():
        is_absent = value is None and name != "label_column"
        if value == defaults.get(name) or value is False or is_absent:
            continue
        if name == "max_train_rows":
            value = _rows_asked_for(value, RunArguments.from_dict(run["arguments"]))
        # A label column that is not there is written as ''.
        options[f"--{name.replace('_', '-')}"] = (
            "" if value is None or value is True else str(value)
        )
    return options


def _rows_asked_for(loaded: int, run: RunArguments) -> int:
    """What ``--max-train-rows`` was, given the rows that were read on account of it."""
    from dynabert.cli.train import rows_to_load

    asked = (rows for rows in range(loaded, 0, -1) if rows_to_load(rows, run) <= loaded)
    return next(asked, loaded)


def _typed(options: Mapping[str, str]) -> list[str]:
    typed = []
    for name, value in options.items():
        typed += [name] if name in _FLAGS else [name, value]
    return typed


def _to_evaluate(data: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Those of the options that ``dynabert evaluate`` has."""
    known = {name for parameter in _command("evaluate").params for name in parameter.opts}
    options = {name: value for name, value in data.items() if name in known}
    if data["--task"] != "file" or "--validation-file" in options:
        return options, ()
    note = "FILE stands for rows to score; training held out a tenth of its own."
    return {**options, "--validation-file": "FILE"}, (note,)


def training_options(run: RunArguments) -> tuple[list[str], list[str]]:
    """The options of ``dynabert train`` that ask for `run`, on top of the preset nearest to it.

    Returns:
        The options, and ``name=value`` of every argument that they do not give and that matters to
        the stages of the run.
    """
    tries = [_options_on(run, preset) for preset in PRESET_NAMES]
    return min(tries, key=lambda found: (len(found[1]), len(found[0])))


def _options_on(run: RunArguments, preset: PresetName) -> tuple[list[str], list[str]]:
    base = RunArguments.preset(preset, run.output_dir)
    options = [] if preset == "paper" else ["--preset", preset]
    options += _by_stage(run, base)
    known = _parameters()
    for field in fields(RunArguments):
        value = getattr(run, field.name)
        if field.name in _UNIMPORTANT or field.name not in known or value is None:
            continue
        if value != getattr(base, field.name) and not field.name.endswith(_BY_STAGE):
            options += _option(known[field.name], value)
    return options, _left_out(run, options)


def _by_stage(run: RunArguments, base: RunArguments) -> list[str]:
    """Epochs, learning rates and the weights of the losses, of the stages that ran."""
    options = []
    for name, of in (("--epochs", "epochs_of"), ("--learning-rate", "learning_rate_of")):
        values = {stage: getattr(run, of)(stage) for stage in run.stages}
        if values != {stage: getattr(base, of)(stage) for stage in run.stages}:
            options += [name, _for_stages(values)]
    distilled = [stage for stage in LABEL_FREE_STAGES if stage in run.stages]
    for place, name in enumerate(("--lambda-logit", "--lambda-hidden")):
        values = {stage: _weights(run, stage)[place] for stage in distilled}
        if values != {stage: _weights(base, stage)[place] for stage in distilled}:
            options += [name, _for_stages(values)]
    return options


def _weights(run: RunArguments, stage: str) -> tuple[float, float]:
    weights: tuple[float, float] = getattr(run, f"{stage.replace('-', '_')}_weights")
    return weights


def _for_stages(values: Mapping[Any, float]) -> str:
    if len(set(values.values())) == 1:
        return _text(next(iter(values.values())))
    return ",".join(f"{stage}={_text(value)}" for stage, value in values.items())


def _option(parameter: Any, value: Any) -> list[str]:
    """One option as it is typed."""
    names = parameter.opts if value is not False else parameter.secondary_opts
    if not names:
        return []
    if isinstance(value, bool):
        return [names[0]]
    if parameter.name in ("widths", "depths"):
        return [names[0], ",".join(map(format_fraction, value))]
    return [names[0], ",".join(value) if isinstance(value, tuple) else _text(value)]


def _text(value: Any) -> str:
    """A number without a needless ``.0``; anything else as it is."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _left_out(run: RunArguments, options: list[str]) -> list[str]:
    """What the command would do otherwise than the run did, as ``name=value``."""
    from dynabert.cli._train_options import run_arguments

    command = ["--model", "M", "--task", "T", "--output-dir", str(run.output_dir), *options]
    with _command("train").make_context("train", command) as context:
        parsed = run_arguments(context.params)
    names = [
        name
        for name in parsed.differences(run)
        if not name.endswith("learning_rate") and name not in _UNIMPORTANT
    ]
    return [f"{name}={getattr(run, name)}" for name in names]


@functools.cache
def _command(verb: str) -> Any:
    from dynabert.cli._app import app

    group: Any = typer.main.get_command(app)
    return group.commands[verb]


def _parameters() -> dict[str, Any]:
    """The options of ``dynabert train`` by the name of their field."""
    return {parameter.name: parameter for parameter in _command("train").params}
