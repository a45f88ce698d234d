"""``dynabert evaluate``: the score of every subnet on a task's validation data."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from dynabert.data.examples import Problem, TaskData
    from dynabert.evaluation import GridRow
    from dynabert.modeling_pretrained import DynaBertPreTrainedModel
    from dynabert.subnet import SubnetConfig

_log = logging.getLogger(__name__)


@app.command()
def evaluate(
    place: options.Place,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for train; default: the run's own task.")
    ] = None,
    data_dir: options.DataDir = None,
    validation_file: options.ValidationFile = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    label_column: options.LabelColumn = "label",
    from_hub: options.FromHub = False,
    widths: options.Widths = None,
    depths: options.Depths = None,
    batch_size: options.BatchSize = 64,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens; default: as for train.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; default: cuda if there is one.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 autocast.")] = False,
    save: Annotated[
        bool, typer.Option(help="Keep the grid in RUN: grid.json, grid.md, grid.png.")
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Score every subnet on the validation rows.

    A sentence encoder, trained without labels, is scored on stsb by the cosine of its embeddings.
    """
    import torch

    from dynabert.data.tasks import load_task
    from dynabert.latency import load_latency
    from dynabert.report import build_report, render_grid
    from dynabert.training.problems import row_length

    where = ModelPlace.find(place)
    device = options.parse_device(device)
    grid = (
        options.parse_fractions("--widths", widths),
        options.parse_fractions("--depths", depths),
    )
    trained = where.run or {"task": None, "arguments": {}}
    task = task or trained["task"]
    if task is None:
        raise ValueError(
            "--task is missing, expected a name. A model alone does not tell its task."
        )
    model = where.load_model()
    config: Any = model.config
    data = load_task(
        task,
        data_dir,
        validation_file=validation_file,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column or None,
        problem=_problem_of_files(model) if task == "file" else "auto",
        label_names=[config.id2label[index] for index in range(config.num_labels)],
        from_hub=from_hub,
        with_train=False,
    )
    torch.nn.Module.to(model, device)
    max_length = max_length or trained["arguments"].get("max_length")
    rows = _score(
        model,
        where,
        data,
        where.subnets(model, *grid),
        row_length(max_length, data.spec.problem, config),
        batch_size=batch_size,
        autocast_dtype=torch.bfloat16 if bf16 else None,
    )
    report = build_report(model, rows, data.spec)
    try:
        report = report.with_latency(load_latency(where.latency_json, model=model))
    except (FileNotFoundError, ValueError) as reason:
        _log.info("the grid has no latencies: %s", reason)
    if save:
        where.save_report(report)
    finish(render_grid(report, "text"), report.to_json(), json_file)


def _problem_of_files(model: DynaBertPreTrainedModel) -> Literal["auto"] | Problem:
    """What own files have to hold for a model to be scored on them."""
    from dynabert import DynaBertForSequenceClassification
    from dynabert.training.problems import MODEL_CLASSES

    if isinstance(model, DynaBertForSequenceClassification):
        return "regression" if model.config.num_labels == 1 else "auto"
    known = (problem for problem, kind in MODEL_CLASSES.items() if isinstance(model, kind))
    return next(known, "regression")


def _score(
    model: DynaBertPreTrainedModel,
    where: ModelPlace,
    data: TaskData,
    subnets: list[SubnetConfig],
    max_length: int,
    **how: Any,
) -> list[GridRow]:
    from transformers import AutoTokenizer

    from dynabert.data.collators import DynamicPadCollator, encode
    from dynabert.data.examples import Example
    from dynabert.evaluation import evaluate_grid
    from dynabert.training.problems import MODEL_CLASSES, encode_examples
    from dynabert.training.task_agnostic import evaluate_similarity

    tokenizer = AutoTokenizer.from_pretrained(where.model_dir)
    collator = DynamicPadCollator(tokenizer)
    spec = data.spec
    if isinstance(model, tuple(MODEL_CLASSES.values())):
        if not isinstance(model, MODEL_CLASSES.get(spec.problem, ())):
            raise ValueError(
                f"--task: {spec.name} is {spec.problem}, expected a task for "
                f"{type(model).__name__}. Was the model trained on this task?"
            )
        if model.config.num_labels != spec.num_labels:
            raise ValueError(
                f"--task: {spec.name} has {spec.num_labels} labels, expected "
                f"{model.config.num_labels} as the model has. Was it trained on this task?"
            )
        dataset = encode_examples(data.validation, spec.problem, tokenizer, max_length)
        return evaluate_grid(model, dataset, collator, spec, subnets, **how)
    if spec.problem != "regression" or len(spec.text_fields) != 2:
        raise ValueError(
            f"--task: {spec.name}, expected pairs with a score such as stsb. "
            "The model is an encoder without a classifier."
        )
    pairs = [item for item in data.validation if isinstance(item, Example)]
    first, second = (
        encode([Example(text, None, None) for text in texts], tokenizer, max_length)
        for texts in ([item.text for item in pairs], [str(item.text_pair) for item in pairs])
    )
    scores = [float(item.label or 0.0) for item in pairs]
    return evaluate_similarity(model, first, second, scores, collator, subnets, **how)
