"""``dynabert train``: from a BERT or RoBERTa checkpoint to a trained grid of subnets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.training.arguments import LABEL_FREE_STAGES, STAGE_NAMES, RunArguments

if TYPE_CHECKING:
    from dynabert.data.examples import TaskData
    from dynabert.training.stages import RunResult


@app.command()
def train(
    model: Annotated[
        str, typer.Option(metavar="M", help="A BERT, RoBERTa or DynaBERT folder, run or hub id.")
    ],
    task: options.Task,
    output_dir: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run; an unfinished one goes on.")
    ],
    data_dir: options.DataDir = None,
    train_file: options.TrainFile = None,
    validation_file: options.ValidationFile = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = "label",
    problem: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Own files: classification, regression or auto. Any task: none, to train a "
            "sentence encoder without its labels.",
        ),
    ] = "auto",
    from_hub: options.FromHub = False,
    max_train_rows: Annotated[
        int | None, typer.Option(help="Train on a seeded choice of this many rows.")
    ] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Choose them with equally many of each class.")
    ] = False,
    stages: Annotated[
        str, typer.Option(metavar="LIST", help="Which of the stages to run, in their order.")
    ] = ",".join(STAGE_NAMES),
    widths: options.Widths = None,
    depths: options.Depths = None,
    epochs: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Of every stage, or by stage: teacher=2,width=2. Default 3."
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate; it falls linearly to zero.")
    ] = RunArguments.learning_rate,
    warmup_ratio: Annotated[
        float, typer.Option(help="Share of a stage's steps in which the learning rate rises.")
    ] = RunArguments.warmup_ratio,
    weight_decay: Annotated[
        float, typer.Option(help="Of AdamW; never applied to biases and LayerNorm.")
    ] = RunArguments.weight_decay,
    batch_size: options.BatchSize = RunArguments.batch_size,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches per optimiser step.")
    ] = RunArguments.gradient_accumulation_steps,
    max_length: Annotated[
        int, typer.Option(help="Longest sequence in tokens; longer ones are cut.")
    ] = RunArguments.max_length,
    lambda_logit: Annotated[
        str | None,
        typer.Option(metavar="W", help="Weight of the logits, or by stage: width=1,width-depth=1."),
    ] = None,
    lambda_hidden: Annotated[
        str | None,
        typer.Option(
            metavar="W", help="Weight of the hidden states. Default width=0.1,width-depth=1."
        ),
    ] = None,
    width_teacher: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Teacher of the width-depth stage: same-width (the paper) or full (its code).",
        ),
    ] = RunArguments.width_depth_teacher,
    subnets_per_step: Annotated[
        str, typer.Option(metavar="HOW", help="all, sandwich or sampled.")
    ] = RunArguments.subnet_sampling,
    importance_rows: Annotated[
        int, typer.Option(help="Rows to score heads and neurons on, beside the training rows.")
    ] = RunArguments.importance_rows,
    importance_source: Annotated[
        str, typer.Option(metavar="WHERE", help="holdout, or dev as in the paper.")
    ] = RunArguments.importance_source,
    importance_rule: Annotated[
        str, typer.Option(metavar="RULE", help="paper, or reference as in the original code.")
    ] = RunArguments.importance_rule,
    pooling: Annotated[
        str, typer.Option(metavar="HOW", help="Without labels: mean or cls.")
    ] = RunArguments.pooling,
    seed: Annotated[
        int, typer.Option(help="Chooses rows, new heads, order and dropout.")
    ] = RunArguments.seed,
    bf16: Annotated[
        bool | None,
        typer.Option(help="Compute in bfloat16 autocast; default: where the hardware has it."),
    ] = None,
    use_cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
    threads: options.Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that RUN holds and start anew.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Fine-tune, rewire by importance and train every subnet; then score the whole grid.

    The same command goes on with an interrupted run, and only reports a finished one.
    """
    from dynabert.data.tasks import load_task
    from dynabert.report import render_grid

    values: dict[str, Any] = {
        "stages": tuple(stage.strip() for stage in stages.split(",")),
        "widths": options.parse_fractions("--widths", widths),
        "depths": options.parse_fractions("--depths", depths),
        "seed": seed,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_ratio": warmup_ratio,
        "width_depth_teacher": width_teacher,
        "subnet_sampling": subnets_per_step,
        "importance_source": importance_source,
        "importance_rows": importance_rows,
        "importance_rule": importance_rule,
        "pooling": pooling,
        "bf16": bf16,
        "use_cpu": use_cpu,
        **_epochs(epochs),
        **_weights(lambda_logit, lambda_hidden),
    }
    run = RunArguments(output_dir, **values)
    check_folder(output_dir, overwrite)
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
        seed=seed,
        from_hub=from_hub,
    )
    set_threads(threads)
    result = start_run(model, data, run, overwrite=overwrite)
    text = f"{render_grid(result.report, 'text')}\nThe model is in {result.model_dir}."
    document = {"model_dir": str(result.model_dir), "grid": result.report.to_json()}
    finish(text, document, json_file)


def start_run(model: str, data: TaskData, run: RunArguments, *, overwrite: bool) -> RunResult:
    """Train `model`, a folder, a run or a hub id; with `overwrite`, remove the former run first.

    Raises:
        OSError: There is no such model.
        ValueError: The stages do not fit the task, the model or the folder.
    """
    from transformers import AutoTokenizer

    from dynabert.configuration_dynabert import DynaBertConfig
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
    if run.max_length > config.max_seq_len:
        raise ValueError(
            f"--max-length: {run.max_length}, expected at most {config.max_seq_len}. "
            "The model has no more positions."
        )
    default_stages(run, config)  # refuses a grid that does not fit, before anything is removed
    if overwrite and run.output_dir.exists():
        shutil.rmtree(run.output_dir)
    return run_stages(name, data, tokenizer, run)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something other than a run.

    Raises:
        ValueError: It does.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir: {folder} is a file, expected a folder. Use another name.")
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
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
    return train_rows + min(run.importance_rows, max(1, train_rows // 9))


def _epochs(text: str | None) -> dict[str, float]:
    by_stage = options.parse_by_stage("--epochs", text, STAGE_NAMES)
    return {f"{stage.replace('-', '_')}_epochs": number for stage, number in by_stage.items()}


def _weights(logit: str | None, hidden: str | None) -> dict[str, tuple[float, float]]:
    logits = options.parse_by_stage("--lambda-logit", logit, LABEL_FREE_STAGES)
    hiddens = options.parse_by_stage("--lambda-hidden", hidden, LABEL_FREE_STAGES)
    weights = {}
    for stage in LABEL_FREE_STAGES:
        name = f"{stage.replace('-', '_')}_weights"
        default = getattr(RunArguments, name)
        weights[name] = (logits.get(stage, default[0]), hiddens.get(stage, default[1]))
    return weights
