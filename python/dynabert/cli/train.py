"""``dynabert train``: from a BERT or RoBERTa checkpoint to a trained grid of subnets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynabert.cli import _options as options
from dynabert.cli import _train_options as train_options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.durable import is_leftover, remove_folder
from dynabert.training.allocator import reuse_freed_memory
from dynabert.training.arguments import RunArguments

if TYPE_CHECKING:
    from dynabert.data.examples import TaskData
    from dynabert.training.stages import RunResult


@app.command(cls=train_options.TrainCommand)
def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        train_options.option(
            options.DATA, "A BERT, RoBERTa or DynaBERT folder, run or hub id.", metavar="M"
        ),
    ],
    task: options.Task,
    output_dir: Annotated[
        Path,
        train_options.option(
            train_options.RUNNING, "Folder of the run; an unfinished one goes on.", metavar="RUN"
        ),
    ],
    data_dir: options.DataDir = None,
    train_file: options.TrainFile = None,
    validation_file: options.ValidationFile = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = "label",
    problem: train_options.ProblemKind = "auto",
    from_hub: options.FromHub = False,
    max_train_rows: train_options.MaxTrainRows = None,
    balanced: train_options.Balanced = False,
    augmented_file: train_options.AugmentedFile = None,
    max_length: train_options.MaxLength = None,
    long_texts: train_options.LongTexts = None,
    preset: train_options.Preset = "paper",
    stages: train_options.Stages = None,
    widths: options.Widths = None,
    depths: options.Depths = None,
    subnet_sampling: train_options.SubnetSampling = None,
    num_sampled: train_options.NumSampled = None,
    lambda_logit: train_options.LambdaLogit = None,
    lambda_hidden: train_options.LambdaHidden = None,
    rewire: train_options.Rewire = None,
    importance_rows: train_options.ImportanceRows = None,
    distillation: train_options.Distillation = None,
    pooling: train_options.Pooling = None,
    eval_steps: train_options.EvalSteps = None,
    epochs: train_options.Epochs = None,
    learning_rate: train_options.LearningRate = None,
    warmup_ratio: train_options.WarmupRatio = None,
    weight_decay: train_options.WeightDecay = None,
    max_grad_norm: train_options.MaxGradNorm = None,
    batch_size: train_options.BatchSize = None,
    gradient_accumulation_steps: train_options.Accumulation = None,
    group_by_length: train_options.GroupByLength = None,
    seed: train_options.Seed = None,
    bf16: train_options.Bf16 = None,
    width_depth_teacher: train_options.WidthDepthTeacher = None,
    depth_rule: train_options.DepthRule = None,
    importance_source: train_options.ImportanceSource = None,
    importance_rule: train_options.ImportanceRule = None,
    importance_batch_size: train_options.ImportanceBatchSize = None,
    hidden_padding: train_options.HiddenPadding = None,
    regression_logits: train_options.RegressionLogits = None,
    selection_metric: train_options.SelectionMetric = None,
    use_cpu: train_options.UseCpu = None,
    threads: options.Threads = None,
    activation_gib: train_options.ActivationGib = None,
    num_workers: train_options.NumWorkers = None,
    eval_batch_size: train_options.EvalBatchSize = None,
    logging_steps: train_options.LoggingSteps = None,
    save_steps: train_options.SaveSteps = None,
    report_to: train_options.ReportTo = None,
    run_name: train_options.RunName = None,
    progress: train_options.Progress = None,
    overwrite: train_options.Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Fine-tune, rewire by importance and train every subnet; then score the whole grid.

    The same command goes on with an interrupted run, and only reports a finished one.
    """
    from dynabert.data.tasks import load_task
    from dynabert.report import render_grid
    from dynabert.training.processes import (
        from_first,
        is_first,
        join_processes,
        leave_processes,
    )

    run = train_options.run_arguments(ctx.params)
    join_processes(run.use_cpu)
    ctx.call_on_close(leave_processes)
    if not is_first():
        logging.getLogger("dynabert").setLevel(logging.ERROR)
    from_first(lambda: check_folder(output_dir, overwrite))
    data = load_task(
        task,
        data_dir,
        train_file=train_file,
        validation_file=validation_file,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column or None,
        problem=problem,  # type: ignore[arg-type]
        max_train_rows=None if max_train_rows is None else rows_to_load(max_train_rows, run),
        balanced=balanced,
        seed=run.seed,
        from_hub=from_hub,
    )
    set_threads(threads)
    reuse_freed_memory()
    result = start_run(model, data, run, overwrite=overwrite)
    text = f"{render_grid(result.report, 'text')}\nThe model is in {result.model_dir}."
    document = {"model_dir": str(result.model_dir), "grid": result.report.to_json()}
    if is_first():
        finish(text, document, json_file)


def start_run(model: str, data: TaskData, run: RunArguments, *, overwrite: bool) -> RunResult:
    """Train `model`, a folder, a run or a hub id; with `overwrite`, remove the former run first.

    Raises:
        OSError: There is no such model.
        ValueError: The stages do not fit the task, the model or the folder.
    """
    from transformers import AutoTokenizer

    from dynabert.configuration_dynabert import DynaBertConfig
    from dynabert.training.processes import is_first
    from dynabert.training.stages import default_stages, run_stages

    path = Path(model)
    if (path / "run.json").exists():
        path /= "model"
    name = str(path) if path.exists() else model
    try:
        config = DynaBertConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"--model: {model!r}, expected a folder with model and tokeniser, or an id on the hub "
            f"that can be reached. ({reason})"
        ) from error
    if run.max_length is not None and run.max_length > config.max_seq_len:
        raise ValueError(
            f"--max-length: {run.max_length}, expected at most {config.max_seq_len}. "
            "The model has no more positions."
        )
    default_stages(run, config)  # refuses a grid that does not fit, before anything is removed
    # The other processes do not look at the folder before `run_stages` has in the first.
    if overwrite and is_first() and run.output_dir.exists():
        remove_folder(run.output_dir)
    return run_stages(name, data, tokenizer, run)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something other than a run.

    Raises:
        ValueError: It does.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir: {folder} is a file, expected a folder. Use another name.")
    if (folder / "run.json").exists() or not folder.exists():
        return
    if not all(is_leftover(path) for path in folder.iterdir()):
        raise ValueError(
            f"--output-dir: {folder} holds files but no run.json, expected a run or nothing. "
            f"{'Only a run is removed. ' if overwrite else ''}Use another folder."
        )


def set_threads(threads: int | None) -> None:
    """Let PyTorch use this many CPU threads from here on; None leaves its choice.

    Raises:
        ValueError: Fewer than one.
    """
    import torch

    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads: {threads}, expected 1 or more. Leave it out for all cores.")
    torch.set_num_threads(threads)


def rows_to_load(train_rows: int, run: RunArguments) -> int:
    """Rows to read so that `train_rows` remain when rows for importance have been held out.

    `run_stages` holds out ``run.importance_rows``, but at most a tenth of what it is given.
    """
    if run.importance_source != "holdout" or train_rows < 1:
        return train_rows
    most = max(1, train_rows // 9)
    return train_rows + min(run.importance_rows or most, most)
