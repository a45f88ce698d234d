"""What each part of the training is worth: rewiring, distillation, the last fine-tuning, sandwich
steps; and every size of the grid trained alone.

    python -m benchmarks.ablation run --data-dir DATA --out-dir RUNS --results FILE.jsonl
    python -m benchmarks.ablation table FILE.jsonl

For each task and seed one fine-tuned teacher is shared: every `Variant` starts from it and goes
through `run_stages`. A finished variant is one line of FILE.jsonl. The same command skips what is
there and goes on with an interrupted variant from its run folder. Seeds are the outermost loop and
tasks the next, so the lines of a stopped run still compare; runs of different tasks or seeds may
write to one file side by side. DATA holds GLUE's folders.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from math import fsum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.ablation_table import render
from benchmarks.records import Deadline, commit_of_checkout, describe_machine, read_rows
from dynabert.cli._options import parse_by_stage, parse_fractions
from dynabert.cli.demo import find_minilm
from dynabert.cli.train import rows_to_load, set_threads
from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.data.examples import TaskData
from dynabert.data.tasks import load_task, subsample
from dynabert.json_file import read_json, write_bytes
from dynabert.latency_table import hardware_name
from dynabert.subnet import SubnetConfig, default_depths, default_widths, subnet_grid
from dynabert.training.arguments import FULL, RunArguments, StageName
from dynabert.training.stages import RunResult, run_stages

_STAGE_SCHEMA = 1
_PATHS = ("output_dir", "augmented_file", "run_name")


@dataclass(frozen=True)
class Variant:
    """One way of training from the teacher.

    Attributes:
        name: Names it in records, and its run folder.
        stages: Stages it goes through.
        changes: Run arguments that differ from those of all other variants.
        continues: The variant whose run it goes on with: same arguments, more stages.
    """

    name: str
    stages: tuple[StageName, ...] = ("width", "width-depth")
    changes: Mapping[str, Any] = field(default_factory=dict)
    continues: str | None = None

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return self.continues or self.name


TEACHER = Variant("teacher", ("teacher",))
ELASTIC = (
    Variant("rewiring+distillation"),
    Variant(
        "rewiring+distillation+final",
        ("width", "width-depth", "final"),
        continues="rewiring+distillation",
    ),
    Variant("rewiring+labels", changes={"distillation": False}),
    Variant("no-rewiring+distillation", changes={"rewire": False}),
    Variant("no-rewiring+labels", changes={"rewire": False, "distillation": False}),
    Variant("rewiring+distillation+sandwich", changes={"subnet_sampling": "sandwich"}),
)
ALONE = "alone"


def single_size(subnet: SubnetConfig, epochs: float) -> Variant:
    """`subnet` cut out of the teacher and fine-tuned alone, from labels.

    Narrow ones keep the most important heads and neurons; shallow ones drop layers.
    """
    changes = {
        "widths": (subnet.width_mult,),
        "depths": (subnet.depth_mult,),
        "final_epochs": epochs,
    }
    return Variant(f"{ALONE} {subnet.name}", ("final",), changes)


@dataclass(frozen=True)
class TaskSettings:
    """Everything that makes two lines of one task comparable; the same in all of them."""

    rows: int
    """Rows the variants train on."""
    teacher_rows: int
    """Rows the teacher trains on."""
    validation_rows: int | None
    """Validation rows, a choice that is the same for all seeds; None: all."""
    teacher_epochs: float
    width_epochs: float
    width_depth_epochs: float
    final_epochs: float
    """Of the last fine-tuning; a single size is fine-tuned for as many epochs as the width and the
    width-depth stage together."""
    widths: tuple[float, ...]
    depths: tuple[float, ...]
    batch_size: int
    learning_rate: float
    teacher_learning_rate: float
    importance_rows: int
    num_sampled: int
    bf16: bool | None

    @property
    def grid(self) -> list[SubnetConfig]:
        """Every size, largest first."""
        return subnet_grid(self.widths, self.depths)

    def variants(self) -> list[Variant]:
        """All variants, in the order they run: elastic ones, then every size but the full one."""
        epochs = self.width_epochs + self.width_depth_epochs
        alone = [single_size(subnet, epochs) for subnet in self.grid if subnet != FULL]
        return [*ELASTIC, *alone]

    def arguments(self, folder: Path, seed: int, variant: Variant) -> RunArguments:
        """What `run_stages` is told for one variant."""
        is_teacher = variant == TEACHER
        values: dict[str, Any] = {
            "stages": variant.stages,
            "widths": self.widths,
            "depths": self.depths,
            "seed": seed,
            "batch_size": self.batch_size,
            "learning_rate": self.teacher_learning_rate if is_teacher else self.learning_rate,
            "teacher_epochs": self.teacher_epochs,
            "width_epochs": self.width_epochs,
            "width_depth_epochs": self.width_depth_epochs,
            "final_epochs": self.final_epochs,
            "importance_rows": self.importance_rows,
            "num_sampled": self.num_sampled,
            "probe_subnets": (),
            "bf16": self.bf16,
            "progress": False,
        }
        return RunArguments(folder, **{**values, **variant.changes})


class Ablation:
    """All variants of all tasks and seeds, with the file of their results."""

    def __init__(
        self,
        model_dir: Path,
        data_dir: Path,
        out_dir: Path,
        results: Path,
        settings: Mapping[str, TaskSettings],
    ) -> None:
        """Read what has been done.

        Args:
            model_dir: A BERT or RoBERTa encoder with its tokeniser.
            data_dir: Holds GLUE's folders.
            out_dir: For run folders; emptied of a task and seed once all its variants are done.
            results: JSON lines, one per variant; made if missing.
            settings: By task.

        Raises:
            ValueError: The results hold a task with other settings.
        """
        self._model_dir = model_dir
        self._data_dir = data_dir
        self._out_dir = out_dir
        self._results = results
        self._settings = settings
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir)
        records = read_rows(results)
        self._done = {(row["task"], row["seed"], row["variant"]) for row in records}
        for row in records:
            if row["task"] in settings:
                self._check_settings(row)

    def _check_settings(self, record: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(asdict(self._settings[record["task"]])))
        found = record["settings"]
        changed = sorted(name for name in wanted if found.get(name) != wanted[name])
        if changed:
            raise ValueError(
                f"ablation: {self._results} holds {record['task']} with another "
                f"{', '.join(changed)}, expected the same, so that its lines compare. Use another "
                "file, or the former values."
            )

    def run(
        self,
        seeds: Sequence[int],
        wanted: Sequence[str] | None = None,
        max_seconds: float = float("inf"),
    ) -> bool:
        """Train what is missing.

        Args:
            seeds: Each is a whole repetition: rows, new heads, order and dropout.
            wanted: Names of variants, ``alone`` for every single size; None: all of them.
            max_seconds: No variant is begun after this many.

        Returns:
            Whether everything asked for is done.
        """
        deadline = Deadline(max_seconds)
        for seed in seeds:
            for task, settings in self._settings.items():
                pending = [
                    variant
                    for variant in settings.variants()
                    if (task, seed, variant.name) not in self._done
                    and (wanted is None or variant.name.split()[0] in wanted)
                ]
                if pending and not self._run_group(task, seed, pending, deadline):
                    return False
        return True

    def _run_group(self, task: str, seed: int, pending: list[Variant], deadline: Deadline) -> bool:
        """The variants of one task and seed; False if time was up before the last."""
        settings = self._settings[task]
        group = self._out_dir / f"{task}-{seed}"
        source = self._model_dir
        data: TaskData | None = None
        for position, variant in enumerate([TEACHER, *pending]):
            if deadline.left_s() <= 0:
                return False
            run = settings.arguments(group / variant.folder, seed, variant)
            if position < 2:  # the teacher's rows, then those of all variants
                data = self._load(task, seed, run, is_teacher=variant == TEACHER)
            assert data is not None
            start = deadline.spent_s()
            result = run_stages(source, data, self._tokenizer, run)
            if (task, seed, variant.name) not in self._done:
                self._add(task, seed, variant, run, result)
                print(
                    f"{deadline.spent_s():7.0f} s  {task} seed {seed}  {variant.name}: "
                    f"{result.report.mean:.4f}, {deadline.spent_s() - start:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            if variant == TEACHER:
                source = result.model_dir
            elif variant.folder not in {later.folder for later in pending[position:]}:
                shutil.rmtree(run.output_dir)
        if all((task, seed, variant.name) in self._done for variant in settings.variants()):
            shutil.rmtree(group)
        return True

    def _load(self, task: str, seed: int, run: RunArguments, *, is_teacher: bool) -> TaskData:
        settings = self._settings[task]
        rows = settings.teacher_rows if is_teacher else settings.rows
        data = load_task(task, self._data_dir, max_train_rows=rows_to_load(rows, run), seed=seed)
        if settings.validation_rows is not None:
            chosen = subsample(data.validation, settings.validation_rows, seed=0)
            data = replace(data, validation=chosen)
        return data

    def _add(
        self, task: str, seed: int, variant: Variant, run: RunArguments, result: RunResult
    ) -> None:
        stages = [
            read_json(run.output_dir / stage / "stage.json", schema=_STAGE_SCHEMA)
            for stage in variant.stages
        ]
        report = result.report
        device = "cuda" if torch.cuda.is_available() else "cpu"
        record = {
            "task": task,
            "variant": variant.name,
            "seed": seed,
            "metric": report.primary_metric,
            "mean": report.mean,
            "scores": {row.subnet.name: row.primary for row in report.rows},
            "validation_rows": report.rows[0].num_rows,
            "steps": sum(stage["steps"] for stage in stages),
            "full_passes": fsum(full_passes(stage, run) for stage in stages),
            "seconds": fsum(stage["seconds"] for stage in stages),
            "resumed": any(stage["resumed_from"] for stage in stages),
            "settings": asdict(self._settings[task]),
            "arguments": {k: v for k, v in run.to_dict().items() if k not in _PATHS},
            "machine": {
                **describe_machine(device),
                "hardware": hardware_name(torch.device(device)),
                "threads": torch.get_num_threads(),
            },
            "commit": commit_of_checkout(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        self._results.parent.mkdir(parents=True, exist_ok=True)
        former = self._results.read_bytes() if self._results.exists() else b""
        torn = former != b"" and not former.endswith(b"\n")  # by a crash, while it was written
        # Added to, not replaced: runs of other tasks or seeds may be writing to it too.
        with self._results.open("ab") as stream:
            stream.write(("\n" * torn + json.dumps(record, allow_nan=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._done.add((task, seed, variant.name))


def full_passes(stage: Mapping[str, Any], run: RunArguments) -> float:
    """What a stage computed, in forward passes of one batch through the whole encoder.

    A backward pass counts as two forward passes, a subnet as its share of the full width times its
    share of the full depth. Evaluation and importance are left out.

    Args:
        stage: Its ``stage.json``.
        run: The run's arguments; drawn subnets count by their expectation.
    """
    subnets = [SubnetConfig.from_dict(values) for values in stage["subnets"]]
    subnets.sort(key=_share)
    always = subnets
    if run.subnet_sampling != "all" and len(subnets) > 1:
        always = [subnets[-1]] if run.subnet_sampling == "sampled" else [subnets[0], subnets[-1]]
    others = [subnet for subnet in subnets if subnet not in always]
    drawn = list(combinations(others, min(run.num_sampled, len(others))))
    costs = [_step_passes([*always, *some], stage["teacher"]) for some in drawn]
    return float(stage["steps"]) * fsum(costs) / len(costs)


def _step_passes(subnets: Sequence[SubnetConfig], teacher: str | None) -> float:
    trained = 3 * fsum(map(_share, subnets))
    if teacher == "full":
        return trained + 1
    # Same width: one pass serves every depth of that width.
    return trained + (fsum({s.width_mult for s in subnets}) if teacher is not None else 0)


def _share(subnet: SubnetConfig) -> float:
    return subnet.width_mult * subnet.depth_mult


def _by_task(option: str, values: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    """``3`` for every task, or ``sst2=1 cola=3``.

    Raises:
        ValueError: Not of that form, or a task is left out.
    """
    try:
        if len(values) == 1 and "=" not in values[0]:
            return dict.fromkeys(tasks, float(values[0]))
        numbers = {task: float(number) for task, number in (v.split("=") for v in values)}
    except ValueError:
        numbers = {}
    if not set(tasks) <= set(numbers):
        raise ValueError(
            f"{option}: {' '.join(values)!r}, expected one number, or TASK=NUMBER for each of "
            f"{', '.join(tasks)}."
        )
    return numbers


def _settings(options: argparse.Namespace, config: DynaBertConfig) -> dict[str, TaskSettings]:
    tasks = options.tasks
    stages = ("width", "width-depth", "final")
    epochs = {**dict.fromkeys(stages, 1.0), **parse_by_stage("--epochs", options.epochs, stages)}
    rows = _by_task("--rows", options.rows, tasks)
    teacher_rows = _by_task("--teacher-rows", options.teacher_rows or options.rows, tasks)
    teacher_epochs = _by_task("--teacher-epochs", options.teacher_epochs, tasks)
    validation = options.validation_rows
    validation_rows = _by_task("--validation-rows", validation, tasks) if validation else {}
    widths = parse_fractions("--widths", options.widths)
    depths = parse_fractions("--depths", options.depths)
    return {
        task: TaskSettings(
            rows=int(rows[task]),
            teacher_rows=int(teacher_rows[task]),
            validation_rows=int(validation_rows[task]) if validation else None,
            teacher_epochs=teacher_epochs[task],
            width_epochs=epochs["width"],
            width_depth_epochs=epochs["width-depth"],
            final_epochs=epochs["final"],
            widths=widths or default_widths(config.num_attention_heads),
            depths=depths or default_depths(config.num_hidden_layers),
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            teacher_learning_rate=options.teacher_learning_rate,
            importance_rows=options.importance_rows,
            num_sampled=options.num_sampled,
            bf16=options.bf16,
        )
        for task in tasks
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="write the tables of a results file beside it")
    table.add_argument("results", type=Path, metavar="FILE.jsonl")
    run = commands.add_parser("run", help="train what is missing in the results file")
    run.add_argument("--data-dir", type=Path, required=True, help="holds SST-2, CoLA, STS-B")
    run.add_argument(
        "--out-dir", type=Path, required=True, help="for run folders, removed when done"
    )
    run.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl")
    run.add_argument("--model", type=Path, help="encoder; default: the demo's MiniLM")
    run.add_argument("--tasks", nargs="+", default=["sst2", "cola", "stsb"])
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    names = [variant.name for variant in ELASTIC]
    run.add_argument("--variants", nargs="+", choices=[*names, ALONE], help="default: all")
    by_task: dict[str, Any] = {"nargs": "+", "metavar": "TASK=N"}
    run.add_argument("--rows", default=["4000"], **by_task, help="training rows of the variants")
    run.add_argument("--teacher-rows", **by_task, help="of the teacher; default: the same")
    run.add_argument("--teacher-epochs", default=["3"], **by_task)
    run.add_argument("--validation-rows", **by_task, help="default: all")
    run.add_argument("--epochs", metavar="N", help="width=1,width-depth=1,final=1")
    run.add_argument("--widths", help="default: the whole grid's")
    run.add_argument("--depths", help="default: the whole grid's")
    run.add_argument("--batch-size", type=int, default=32)
    run.add_argument("--learning-rate", type=float, default=5e-5)
    run.add_argument("--teacher-learning-rate", type=float, default=5e-5)
    run.add_argument("--importance-rows", type=int, default=512)
    run.add_argument(
        "--num-sampled", type=int, default=2, help="further subnets of a sandwich step"
    )
    run.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: where it pays")
    run.add_argument("--threads", type=int)
    run.add_argument("--max-seconds", type=float, default=float("inf"), help="begin nothing after")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if time was up before everything was done."""
    options = _parser().parse_args(arguments)
    done = True
    if options.command == "run":
        set_threads(options.threads)
        model_dir = options.model or find_minilm()
        ablation = Ablation(
            model_dir,
            options.data_dir,
            options.out_dir,
            options.results,
            _settings(options, DynaBertConfig.from_pretrained(model_dir)),
        )
        done = ablation.run(options.seeds, options.variants, options.max_seconds)
    if options.results.exists():
        text = render(read_rows(options.results), options.results.name)
        write_bytes(options.results.with_suffix(".md"), text.encode())
        print(text)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
