"""The options of ``dynabert train``, and the `RunArguments` they make.

An option that is not given is None, so that a preset shows through; its help gives the default of
`RunArguments`. The parameters are named as the fields there, whatever the option is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dynabert.cli._options import DATA, METHOD, parse_by_stage, parse_fractions
from dynabert.training.arguments import LABEL_FREE_STAGES, STAGE_NAMES, RunArguments
from dynabert.training.presets import PRESET_NAMES

OPTIMISATION, COMPATIBILITY, RUNNING = "Optimisation", "As in the original code", "Running"
_SECTIONS = (DATA, METHOD, OPTIMISATION, COMPATIBILITY, RUNNING)


def option(section: str, help_text: str, *names: str, field: str = "", **details: Any) -> Any:
    """An option in a section of the help, which gives the default of the `RunArguments` field."""
    if field:
        default = getattr(RunArguments, field)
        shown = ("no", "yes")[default] if isinstance(default, bool) else default
        help_text += f"  [default: {shown}]"
    return typer.Option(
        *names, help=help_text, rich_help_panel=section, show_default=False, **details
    )


class TrainCommand(TyperCommand):
    """Lists the options section by section."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in _SECTIONS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                section = getattr(param, "rich_help_panel", None) or RUNNING
                sections[section].append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


ProblemKind = Annotated[
    str,
    option(
        DATA,
        "Own files: classification, regression, token-classification, question-answering or auto. "
        "Any task of texts: none, to train a sentence encoder without its labels.",
        metavar="KIND",
    ),
]
MaxTrainRows = Annotated[int | None, option(DATA, "Train on a seeded choice of this many rows.")]
Balanced = Annotated[
    bool, option(DATA, "Choose them with equally many of each class.", "--balanced")
]
AugmentedFile = Annotated[
    Path | None, option(DATA, "Further rows without labels, for the stages with a teacher.")
]
MaxLength = Annotated[
    int | None,
    option(
        DATA,
        "Longest sequence in tokens; default: 128, for question answering 384, or what the model "
        "can take.",
    ),
]
LongTexts = Annotated[
    str | None,
    option(
        DATA,
        "A text with more tokens than the model has positions: error (default for own files), or "
        "cut (default for other tasks).",
        metavar="HOW",
    ),
]

Preset = Annotated[
    str,
    option(
        METHOD,
        f"Values for what is not given: {', '.join(PRESET_NAMES)}. paper is the default of every "
        "option; reference does what the original code does, reference-roberta with its warm-up "
        "for a RoBERTa; quick takes one epoch for a stage and four subnets for a step.",
        metavar="NAME",
    ),
]
Stages = Annotated[
    str | None,
    option(
        METHOD,
        f"Which stages to run, in this order. Default {','.join(STAGE_NAMES)}.",
        metavar="LIST",
    ),
]
LambdaLogit = Annotated[
    str | None,
    option(METHOD, "Weight of the logits. Default width=1,width-depth=1.", metavar="W"),
]
LambdaHidden = Annotated[
    str | None,
    option(METHOD, "Weight of the hidden states. Default width=0.1,width-depth=1.", metavar="W"),
]
SubnetSampling = Annotated[
    str | None,
    option(
        METHOD,
        "all, sandwich or sampled.",
        "--subnets-per-step",
        field="subnet_sampling",
        metavar="HOW",
    ),
]
NumSampled = Annotated[
    int | None,
    option(METHOD, "Subnets that sandwich and sampled draw besides.", field="num_sampled"),
]
ImportanceRows = Annotated[
    int | None,
    option(
        METHOD,
        "Rows to score heads and neurons on, beside the training rows.",
        field="importance_rows",
    ),
]
Rewire = Annotated[
    bool | None,
    option(
        METHOD,
        "Sort heads and neurons by importance first.",
        "--rewire/--no-rewire",
        field="rewire",
    ),
]
Distillation = Annotated[
    bool | None,
    option(
        METHOD,
        "Learn width and width-depth from a teacher, or from labels.",
        "--distillation/--labels-only",
        field="distillation",
    ),
]
Pooling = Annotated[
    str | None, option(METHOD, "Without labels: mean or cls.", field="pooling", metavar="HOW")
]
EvalSteps = Annotated[
    int | None,
    option(
        METHOD,
        "Steps between two evaluations, the best of which is kept; default: one after each epoch.",
    ),
]

Epochs = Annotated[
    str | None,
    option(OPTIMISATION, "Of every stage, or by stage: teacher=2,width=2. Default 3.", metavar="N"),
]
LearningRate = Annotated[
    str | None,
    option(
        OPTIMISATION,
        "Highest learning rate, which falls linearly to zero, of every stage, or by stage: "
        "teacher=5e-5,width=2e-5.",
        field="learning_rate",
        metavar="RATE",
    ),
]
WarmupRatio = Annotated[
    float | None,
    option(
        OPTIMISATION,
        "Share of a stage's steps in which the learning rate rises.",
        field="warmup_ratio",
    ),
]
WeightDecay = Annotated[
    float | None,
    option(
        OPTIMISATION,
        "Of AdamW; never applied to biases and LayerNorm.",
        field="weight_decay",
    ),
]
MaxGradNorm = Annotated[
    float | None,
    option(OPTIMISATION, "Norm the subnets' summed gradient is clipped to.", field="max_grad_norm"),
]
BatchSize = Annotated[
    int | None, option(OPTIMISATION, "Sequences per batch and process.", field="batch_size")
]
Accumulation = Annotated[
    int | None,
    option(OPTIMISATION, "Batches per optimiser step.", field="gradient_accumulation_steps"),
]
GroupByLength = Annotated[
    bool | None,
    option(
        OPTIMISATION,
        "Put sequences of like length into a batch.",
        "--group-by-length/--no-group-by-length",
        field="group_by_length",
    ),
]
Seed = Annotated[
    int | None,
    option(OPTIMISATION, "Chooses rows, new heads, order and dropout.", field="seed"),
]
Bf16 = Annotated[
    bool | None,
    option(OPTIMISATION, "Compute in bfloat16 autocast; default: where the hardware has it."),
]

WidthDepthTeacher = Annotated[
    str | None,
    option(
        COMPATIBILITY,
        "Teacher of the width-depth stage: same-width (the paper) or full (its code).",
        "--width-teacher",
        field="width_depth_teacher",
        metavar="WHICH",
    ),
]
DepthRule = Annotated[
    str | None,
    option(
        COMPATIBILITY,
        "Layers that a shallower subnet keeps: paper (the last) or reference (the first); "
        "default: what the model says, else paper.",
        metavar="RULE",
    ),
]
ImportanceSource = Annotated[
    str | None,
    option(
        COMPATIBILITY,
        "Rows for importance: holdout, or dev as in the paper.",
        field="importance_source",
        metavar="WHERE",
    ),
]
ImportanceRule = Annotated[
    str | None,
    option(
        COMPATIBILITY,
        "Formula of importance: paper, or reference.",
        field="importance_rule",
        metavar="RULE",
    ),
]
ImportanceBatchSize = Annotated[
    int | None,
    option(COMPATIBILITY, "Sequences per batch that is scored; default: --batch-size."),
]
HiddenPadding = Annotated[
    bool | None,
    option(
        COMPATIBILITY,
        "Pad rows to --max-length and count padding in the loss on hidden states.",
        "--hidden-padding/--no-hidden-padding",
        field="hidden_padding",
    ),
]
RegressionLogits = Annotated[
    bool | None,
    option(
        COMPATIBILITY,
        "Learn the scores of a regression from the teacher.",
        "--regression-logits/--no-regression-logits",
        field="regression_logits",
    ),
]
SelectionMetric = Annotated[
    str | None,
    option(
        COMPATIBILITY,
        "Metric the best model is chosen by: a name, or reference (Pearson for a score); "
        "default: the task's first.",
        metavar="NAME",
    ),
]

UseCpu = Annotated[bool | None, option(RUNNING, "Stay on the CPU.", "--cpu")]
ActivationGib = Annotated[
    float | None,
    option(
        RUNNING,
        "Memory for the activations of one training pass, in GiB; a step takes several passes "
        "where it is short.",
        field="activation_gib",
    ),
]
NumWorkers = Annotated[
    int | None,
    option(RUNNING, "Processes that collate batches beside the training one.", field="num_workers"),
]
EvalBatchSize = Annotated[
    int | None,
    option(RUNNING, "Sequences per forward pass in evaluation.", field="eval_batch_size"),
]
LoggingSteps = Annotated[
    int | None, option(RUNNING, "Steps between two entries of the log.", field="logging_steps")
]
SaveSteps = Annotated[
    int | None, option(RUNNING, "Steps between two checkpoints.", field="save_steps")
]
ReportTo = Annotated[
    str | None,
    option(
        RUNNING,
        "Report the log of each stage, too: tensorboard, wandb or another integration of "
        "transformers.Trainer, or several.",
        metavar="LIST",
    ),
]
RunName = Annotated[
    str | None, option(RUNNING, "Name of the run there; default: that of RUN.", metavar="NAME")
]
Progress = Annotated[
    bool | None,
    option(RUNNING, "Show progress on stderr.", "--progress/--no-progress", field="progress"),
]
Overwrite = Annotated[
    bool, option(RUNNING, "Remove the run that RUN holds and start anew.", "--overwrite")
]


def run_arguments(params: Mapping[str, Any]) -> RunArguments:
    """What the options of the command ask for, on top of the preset.

    Args:
        params: The value of every option by the name of its parameter, None where it was not given.

    Raises:
        ValueError: A value cannot be read or is out of range.
    """
    preset, output_dir = params["preset"], params["output_dir"]
    weights = _weights(
        RunArguments.preset(preset, output_dir), params["lambda_logit"], params["lambda_hidden"]
    )
    values = {field.name: params.get(field.name) for field in fields(RunArguments)}
    del values["output_dir"]
    values |= {
        "stages": _parts(params["stages"]),
        "widths": parse_fractions("--widths", params["widths"]),
        "depths": parse_fractions("--depths", params["depths"]),
        "report_to": _parts(params["report_to"]),
        **_learning_rates(params["learning_rate"]),
        **_epochs(params["epochs"]),
        **weights,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return RunArguments.preset(preset, output_dir, **given)


def _parts(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _epochs(text: str | None) -> dict[str, float]:
    by_stage = parse_by_stage("--epochs", text, STAGE_NAMES)
    return {f"{stage.replace('-', '_')}_epochs": number for stage, number in by_stage.items()}


def _learning_rates(text: str | None) -> dict[str, float | None]:
    by_stage = parse_by_stage("--learning-rate", text, STAGE_NAMES)
    if len(by_stage) == len(STAGE_NAMES) and len(set(by_stage.values())) == 1:
        return {"learning_rate": by_stage["teacher"]}
    rates = {f"{stage.replace('-', '_')}_learning_rate": by_stage[stage] for stage in by_stage}
    return {"learning_rate": None, **rates}


def _weights(
    base: RunArguments, logit: str | None, hidden: str | None
) -> dict[str, tuple[float, float]]:
    logits = parse_by_stage("--lambda-logit", logit, LABEL_FREE_STAGES)
    hiddens = parse_by_stage("--lambda-hidden", hidden, LABEL_FREE_STAGES)
    weights = {}
    for stage in LABEL_FREE_STAGES:
        name = f"{stage.replace('-', '_')}_weights"
        default = getattr(base, name)
        weights[name] = (logits.get(stage, default[0]), hiddens.get(stage, default[1]))
    return weights
