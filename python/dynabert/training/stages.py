"""A whole training run: the stages teacher, width, width-depth and final, each from the model
before it.

Stages are data (`default_stages`), the loop over them is one (`run_stages`). A run is resumable by
stage and by step: a finished stage has a ``stage.json``; an interrupted one goes on from its newest
whole checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from dynabert.configuration_dynabert import DynaBertConfig
from dynabert.data.examples import TaskData, TaskSpec
from dynabert.durable import staged_folder
from dynabert.evaluation import GridRow
from dynabert.importance import compute_importance
from dynabert.json_file import read_json, write_bytes, write_json
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.report import GridReport, build_report, render_grid
from dynabert.rewiring import rewire
from dynabert.rewiring_record import FILE_NAME as REWIRING_FILE
from dynabert.subnet import SubnetConfig, default_depths, default_widths, subnet_grid
from dynabert.training.arguments import (
    FULL,
    LABEL_FREE_STAGES,
    RunArguments,
    Stage,
    TeacherKind,
)
from dynabert.training.problems import PreparedTask
from dynabert.training.processes import from_first, is_first, join_processes, shared_out
from dynabert.training.reporting import check_integrations, stage_reports
from dynabert.training.resumable_trainer import SaveEvery
from dynabert.training.run_folder import RunFolder
from dynabert.training.sharding import whole_weights
from dynabert.training.trainer import DynaBertTrainer

_log = logging.getLogger(__name__)
_SCHEMA = 1


@dataclass(frozen=True)
class RunResult:
    """What a run has made.

    Attributes:
        model_dir: The trained model, with configuration, tokeniser and rewiring record.
        report: Scores and sizes of every trained subnet on the validation data.
    """

    model_dir: Path
    report: GridReport


def default_stages(
    run: RunArguments, config: DynaBertConfig, *, is_rewired: bool = False
) -> list[Stage]:
    """The stages of a run as data (DynaBERT, algorithm 1).

    ``teacher``: the full network, from labels. ``width``: every width at full depth, from the full
    network the stage starts from. ``width-depth``: the whole grid, each from the equally wide
    subnet of full depth. ``final``: the subnets of the stage before it, from labels. Without
    distillation every stage learns from labels.

    Args:
        run: Which stages, grid, epochs and weights.
        config: Size of the network; every subnet is checked against it.
        is_rewired: Whether the model the run starts from has been rewired. Where it has not and
            there is no width stage, narrow subnets have learned nothing yet, so the width-depth
            stage learns from the full network.

    Raises:
        ValueError: A subnet is not a whole number of heads or layers, or the grid has several
            subnets and not the full network.
    """
    widths = run.widths or default_widths(config.head_counts)
    depths = run.depths or default_depths(config.num_hidden_layers)
    grid = tuple(subnet_grid(widths, depths))
    by_width = tuple(subnet_grid(widths, (1.0,)))
    for subnet in grid:
        subnet.resolve(
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.head_counts,
            intermediate_size=config.neuron_counts,
            depth_rule=run.depth_rule or config.depth_rule,
        )
    knows_widths = is_rewired or "width" in run.stages
    trained = by_width if "width" in run.stages and "width-depth" not in run.stages else grid
    subnets = {"teacher": (FULL,), "width": by_width, "width-depth": grid, "final": trained}
    teachers: dict[str, TeacherKind] = {}
    if run.distillation:
        teachers["width"] = "full"
        teachers["width-depth"] = run.width_depth_teacher if knows_widths else "full"
    weights = {"width": run.width_weights, "width-depth": run.width_depth_weights}
    without = (Stage.logit_weight, Stage.hidden_weight)
    return [
        Stage(
            name,
            subnets[name],
            teachers.get(name),
            logit_weight=weights.get(name, without)[0],
            hidden_weight=weights.get(name, without)[1],
            num_epochs=run.epochs_of(name),
            learning_rate=run.learning_rate_of(name),
            subnet_sampling=run.subnet_sampling,
            num_sampled=run.num_sampled,
            hidden_padding=run.hidden_padding,
            regression_logits=run.regression_logits,
        )
        for name in run.stages
    ]


def run_stages(
    model_path: str | Path,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    run: RunArguments,
) -> RunResult:
    """Train a model through its stages and score every trained subnet; go on where a former call
    was interrupted.

    Writes ``run.output_dir``; docs/training.md says what it holds. The first stage with a narrow
    subnet begins by rewiring, unless the model has been rewired before.

    Args:
        model_path: A BERT, RoBERTa or DynaBERT checkpoint: a folder or a hub id. Without a teacher
            stage it must have been fine-tuned on this task, if there is anything to rewire or to
            distil.
        data: The task. Without labels (`problem` ``none``) a sentence encoder is trained, on hidden
            states and pooled output.
        tokenizer: The model's tokeniser.
        run: Everything else.

    Returns:
        Where the model is, and its grid.

    Raises:
        ValueError: The stages do not fit the task, the model or the folder. Nothing has been
            written then.
        FloatingPointError: A loss was not finite; the run can be resumed from the last checkpoint.

    Example:
        >>> run = RunArguments(Path("run"), stages=("teacher", "width"))  # doctest: +SKIP
        >>> data = load_task("sst2", data_dir)  # doctest: +SKIP
        >>> run_stages("bert-base-uncased", data, tokenizer, run).report.mean  # doctest: +SKIP
        0.913
    """
    join_processes(run.use_cpu)
    run = replace(run, progress=run.progress and is_first())
    with _no_foreign_bars():
        return _Run(str(model_path), data, tokenizer, run).execute()


class _Run:
    """One call of `run_stages`: the data, tokenised once, and the loop over the stages."""

    def __init__(
        self,
        model_path: str,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        run: RunArguments,
    ) -> None:
        self._check_stages(data.spec, run)
        check_integrations(run.report_to)
        self._model_path = model_path
        self._data = data
        self._tokenizer = tokenizer
        self._run = run
        self._stages = default_stages(
            run,
            DynaBertConfig.from_pretrained(model_path),
            is_rewired=_is_rewired(model_path),
        )
        self._folder = RunFolder(run.output_dir)
        self._autocast_dtype = torch.bfloat16 if self._uses_bf16 else None
        self._task = PreparedTask(model_path, data, tokenizer, run)
        self._metric = _selection_metric(run, self._task.report_spec)

    @staticmethod
    def _check_stages(spec: TaskSpec, run: RunArguments) -> None:
        needs_labels = [stage for stage in run.stages if stage not in LABEL_FREE_STAGES]
        if spec.problem == "none" and needs_labels:
            raise ValueError(
                f"run_stages: stages={','.join(run.stages)!r} on task {spec.name}, which has no "
                f"labels, expected only {' or '.join(LABEL_FREE_STAGES)}. Leave out "
                f"{' and '.join(needs_labels)}."
            )
        if spec.problem == "none" and not run.distillation:
            raise ValueError(
                f"run_stages: distillation=False on task {spec.name}, which has no labels, "
                "expected True. There is only the teacher to learn from."
            )
        if spec.problem == "question-answering" and run.hidden_padding:
            raise ValueError(
                f"run_stages: hidden_padding=True on task {spec.name}, expected False. Padding "
                "would be scored as an answer; the original code has no question answering."
            )
        if run.augmented_file is not None and not run.distillation:
            raise ValueError(
                f"run_stages: augmented_file={str(run.augmented_file)!r} with distillation=False, "
                "expected None. Its rows have no labels, only a teacher can tell what to learn."
            )

    @cached_property
    def _uses_bf16(self) -> bool:
        return bf16_pays(self._run.use_cpu) if self._run.bf16 is None else self._run.bf16

    def execute(self) -> RunResult:
        from_first(self._begin)
        source = self._model_path
        trained = False
        for stage in self._stages:
            record = from_first(partial(self._folder.finished, stage.name))
            if record is None:
                self._train(stage, source)
                trained = True
            elif record["starts_from"] != self._name(source):
                raise ValueError(
                    f"run_stages: stage {stage.name} in {self._folder.path} started from "
                    f"{record['starts_from']}, expected {self._name(source)}. Use another folder, "
                    "or the former stages."
                )
            else:
                _log.info("stage %s is finished", stage.name)
            source = str(self._folder.stage_dir(stage.name))
        if not trained and from_first(self._is_published):
            return RunResult(self._folder.model_dir, GridReport.load(self._folder.grid_json))
        return self._publish(source)

    def _begin(self) -> None:
        self._folder.begin(self._run, self._data, self._model_path, bf16=self._uses_bf16)

    def _is_published(self) -> bool:
        return self._folder.grid_json.exists() and self._folder.model_dir.exists()

    def _name(self, source: str) -> str:
        """How records call the model a stage starts from: the stage's name, or the path of the
        run's model."""
        return source if source == self._model_path else Path(source).name

    def _train(self, stage: Stage, source: str) -> None:
        start = perf_counter()
        args = self._training_arguments(stage)
        student_path, rewiring = from_first(lambda: self._start(stage, source, args.device))
        set_seed(self._run.seed)
        # What was scored for rewiring, or is a teacher, must have learned its task.
        fresh_head = stage.teacher is None and student_path == self._model_path
        student = self._task.load(student_path, fresh_head=fresh_head)
        teacher = self._task.load(source) if stage.teacher is not None else None
        trainer = DynaBertTrainer(
            student,
            args,
            stage=stage,
            problem=self._data.spec.problem,
            train_dataset=self._task.train_rows if teacher is None else self._task.taught_rows,
            data_collator=self._task.train_collator,
            teacher=teacher,
            evaluator=lambda model: self._scores(model, stage.subnets),
            pooling=self._run.pooling,
            group_by_length=self._run.group_by_length,
            activation_budget=int(self._run.activation_gib * 2**30),
            callbacks=[
                SaveEvery(self._run.save_steps),
                *stage_reports(self._run.report_to, self._folder.log_dir(stage.name)),
            ],
        )
        trainer.train(resume_from_checkpoint=True)
        weights = whole_weights(student)
        log = trainer.state.log_history
        record = {
            "name": stage.name,
            "starts_from": self._name(source),
            "teacher": stage.teacher,
            "subnets": [subnet.to_dict() for subnet in stage.subnets],
            "rewiring": rewiring,
            "metrics": _best(log, trainer.state.best_global_step),
            "steps": trainer.state.global_step,
            "resumed_from": trainer.resumed_from.name if trainer.resumed_from else None,
            "seconds": perf_counter() - start,
            "log": log,
        }
        from_first(
            lambda: self._folder.finish(stage.name, student, self._tokenizer, record, weights)
        )

    def _scores(self, model: nn.Module, subnets: Sequence[SubnetConfig]) -> list[GridRow]:
        """Scores during a stage, by the metric its best model is chosen by."""

        def score(some: Sequence[SubnetConfig]) -> list[GridRow]:
            return self._task.evaluate(model, some, self._autocast_dtype)

        # Every process has a part in each forward pass of a sharded model.
        rows = score(subnets) if isinstance(model, FSDPModule) else shared_out(subnets, score)
        return [replace(row, primary=row.metrics[self._metric]) for row in rows]

    def _start(
        self, stage: Stage, source: str, device: torch.device
    ) -> tuple[str, dict[str, Any] | None]:
        """The model a stage starts from, and what rewiring it did to the probed subnets."""
        self._folder.recover(stage.name)
        narrow = any(subnet.width_mult < 1 for subnet in stage.subnets)
        if not self._run.rewire or not narrow or _is_rewired(source):
            return source, None
        folder = self._folder.start_dir(stage.name)
        record = folder / "probe.json"
        if not record.exists():
            _log.info("rewiring %s by importance", self._name(source))
            model = self._task.load(source)
            _move(model, device)
            probed = self._probe_subnets()
            scores = {"before": self._probe(model, probed)}
            importance = compute_importance(
                model,
                self._importance_batches(),
                loss=self._task.importance_loss,
                rule=self._run.importance_rule,
                progress=self._run.progress,
            )
            rewire(
                model,
                importance,
                {
                    "data": self._data.source,
                    "fingerprint": self._data.fingerprint,
                    "rows": self._run.importance_source,
                    "seed": self._run.seed,
                    "batch_size": self._importance_batch_size,
                },
            )
            scores["after"] = self._probe(model, probed)
            with staged_folder(folder) as staged:
                model.save_pretrained(staged)
                write_json(staged / record.name, {"schema": _SCHEMA, **scores})
        document = read_json(record, schema=_SCHEMA)
        return str(folder), {name: document[name] for name in ("before", "after")}

    def _probe_subnets(self) -> tuple[SubnetConfig, ...]:
        if self._run.probe_subnets is not None:
            return self._run.probe_subnets
        narrow = {s for stage in self._stages for s in stage.subnets if s.width_mult < 1}
        return (min(narrow, key=lambda s: (-s.depth_mult, s.width_mult)),)

    def _probe(self, model: nn.Module, subnets: Sequence[SubnetConfig]) -> dict[str, Any]:
        if not subnets:
            return {}
        return {row.subnet.name: dict(row.metrics) for row in self._task.evaluate(model, subnets)}

    @property
    def _importance_batch_size(self) -> int:
        batch_size = self._run.importance_batch_size or self._run.batch_size
        return min(batch_size, len(self._task.importance_rows))

    def _importance_batches(self) -> DataLoader[Any]:
        return DataLoader(
            self._task.importance_rows,
            batch_size=self._importance_batch_size,
            # The original code reads its rows in order, and with its rule the order matters.
            shuffle=self._run.importance_rule != "reference",
            generator=torch.Generator().manual_seed(self._run.seed),
            collate_fn=self._task.collator,
            drop_last=not self._task.has_labels,  # one sentence alone has nothing to be told from
        )

    def _training_arguments(self, stage: Stage) -> TrainingArguments:
        run = self._run
        evaluated = "epoch" if run.eval_steps is None else "steps"
        return TrainingArguments(
            output_dir=str(self._folder.checkpoint_dir(stage.name)),
            num_train_epochs=stage.num_epochs,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=run.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=run.weight_decay,
            max_grad_norm=run.max_grad_norm,
            optim="adamw_torch_fused",
            per_device_train_batch_size=run.batch_size,
            gradient_accumulation_steps=run.gradient_accumulation_steps,
            bf16=self._uses_bf16,
            # Without a GPU, TrainingArguments takes bf16 only when told so.
            use_cpu=run.use_cpu or not torch.cuda.is_available(),
            seed=run.seed,
            eval_strategy=evaluated,
            eval_steps=run.eval_steps,
            # The best model can be loaded again only if there is a checkpoint of each evaluation.
            save_strategy=evaluated,
            save_steps=run.eval_steps or run.save_steps,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_grid_mean",
            greater_is_better=True,
            logging_steps=run.logging_steps,
            # Reads the loss of every step back from the device; the trainer has its own check.
            logging_nan_inf_filter=False,
            dataloader_num_workers=run.num_workers,
            disable_tqdm=not run.progress,
            report_to="none",  # `stage_reports` makes the callbacks
            run_name=f"{run.run_name or run.output_dir.resolve().name}-{stage.name}",
        )

    def _publish(self, source: str) -> RunResult:
        """Save the last stage's model as the run's result, and its grid."""
        stage = self._stages[-1]
        model = self._task.load(source)
        _move(model, self._training_arguments(stage).device)
        rows = shared_out(stage.subnets, lambda some: self._task.evaluate(model, some))
        report = build_report(model, rows, self._task.report_spec)
        from_first(lambda: self._write_result(model, report))
        return RunResult(self._folder.model_dir, report)

    def _write_result(self, model: DynaBertPreTrainedModel, report: GridReport) -> None:
        with staged_folder(self._folder.model_dir) as staged:
            model.save_pretrained(staged)
            self._tokenizer.save_pretrained(staged)
        write_bytes(self._folder.grid_markdown, render_grid(report).encode())
        self._folder.remove_leftovers()
        report.save(self._folder.grid_json)


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """Without the bars transformers draws whenever it loads or saves weights, between those of the
    stages."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _selection_metric(run: RunArguments, spec: TaskSpec) -> str:
    """The metric of a task whose mean over the grid tells the best model of a stage.

    Raises:
        ValueError: The task has no such metric.
    """
    if run.selection_metric == "reference":
        return "pearson" if "pearson" in spec.metrics else spec.primary_metric
    metric = run.selection_metric or spec.primary_metric
    if metric not in spec.metrics:
        raise ValueError(
            f"run_stages: selection_metric={metric!r}, expected one of {', '.join(spec.metrics)}, "
            f"the metrics of {spec.name}."
        )
    return metric


def bf16_pays(use_cpu: bool = False) -> bool:
    """Whether the device training would run on multiplies bfloat16 in hardware."""
    if torch.cuda.is_available() and not use_cpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _is_rewired(model_path: str) -> bool:
    """Whether a checkpoint, a folder or a hub id, comes with a rewiring record."""
    record = cached_file(model_path, REWIRING_FILE, _raise_exceptions_for_missing_entries=False)
    return record is not None


def _best(log: list[dict[str, Any]], step: int | None) -> dict[str, float]:
    """The scores of the evaluation at `step`, without their prefix."""
    for entry in reversed(log):
        if "eval_grid_mean" in entry and (step is None or entry["step"] == step):
            return {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return {}
