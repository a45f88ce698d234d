"""``dynabert evaluate``: the score of every subnet on a task's validation data."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace
from dynabert.cli._scoring import problem_of_files, scorer
from dynabert.json_file import write_json

if TYPE_CHECKING:
    from dynabert.report import GridReport

_log = logging.getLogger(__name__)
_FLOAT32 = "float32"


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
    dtype: options.Dtype = "float32",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 autocast.")] = False,
    save: Annotated[
        bool,
        typer.Option(
            help="Keep the grid in RUN: grid.json, grid.md, grid.png; with --dtype int8 in "
            "grid-int8.json alone."
        ),
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Score every subnet on the validation rows.

    A sentence encoder, trained without labels, is scored on stsb by the cosine of its embeddings.

    With --dtype the weights are cast, or computed with in integers (int8), as dynabert latency
    times them; the scores are shown beside those of the float32 grid in RUN, which stays.
    """
    import torch

    from dynabert.data.tasks import load_task
    from dynabert.latency import load_latency
    from dynabert.report import build_report, render_grid
    from dynabert.training.problems import row_length

    where = ModelPlace.find(place)
    element_type = options.parse_dtype(dtype)
    if bf16 and dtype != _FLOAT32:
        raise ValueError(
            f"--bf16 with --dtype {dtype}, expected one of them. Autocast computes with float32 "
            "weights; --dtype casts them."
        )
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
        problem=problem_of_files(model) if task == "file" else "auto",
        label_names=[config.id2label[index] for index in range(config.num_labels)],
        from_hub=from_hub,
        with_train=False,
    )
    is_int8 = element_type == torch.int8
    torch.nn.Module.to(model, device=device, dtype=torch.float32 if is_int8 else element_type)
    model.quantize("int8" if is_int8 else None)
    max_length = max_length or trained["arguments"].get("max_length")
    subnets = where.subnets(model, *grid)
    if grid == (None, None):
        subnets += where.uneven_subnets()  # or saving the grid would lose what a search has found
    score = scorer(
        model,
        where,
        data.spec,
        data.validation,
        row_length(max_length, data.spec.problem, config),
        batch_size=batch_size,
        autocast_dtype=torch.bfloat16 if bf16 else None,
    )
    rows = score(subnets)
    report = build_report(model, rows, data.spec)
    of_dtype = None if dtype == _FLOAT32 else dtype
    try:
        table = load_latency(where.latency_json, model=model, dtype=of_dtype)
        report = report.with_latency(table)
    except (FileNotFoundError, ValueError) as reason:
        _log.info("the grid has no latencies: %s", reason)
    text, document = render_grid(report, "text"), report.to_json()
    if of_dtype is not None:
        compared = compare_grids(_saved_grid(where), report)
        text += "\n" + render_comparison(compared, dtype)
        document |= {"dtype": dtype, "float32": compared}
        if save:
            write_json(where.path / f"grid-{dtype}.json", document)
    elif save:
        where.save_report(report)
    finish(text, document, json_file)


def _saved_grid(where: ModelPlace) -> GridReport | None:
    from dynabert.report import GridReport

    return GridReport.load(where.grid_json) if where.grid_json.exists() else None


def compare_grids(saved: GridReport | None, report: GridReport) -> list[dict[str, Any]]:
    """Scores of the same subnets in two grids: ``subnet``, ``saved``, ``score``, ``difference``.

    Empty where the saved grid is of another task, or of other rows of it.
    """
    if saved is None or (saved.task, saved.primary_metric) != (report.task, report.primary_metric):
        return []
    before = {row.subnet: row for row in saved.rows}
    return [
        {
            "subnet": row.subnet.name,
            "saved": before[row.subnet].primary,
            "score": row.primary,
            "difference": row.primary - before[row.subnet].primary,
        }
        for row in report.rows
        if row.subnet in before and before[row.subnet].num_rows == row.num_rows
    ]


def render_comparison(compared: list[dict[str, Any]], dtype: str) -> str:
    """The comparison as text for a terminal."""
    if not compared:
        return "No float32 scores of these subnets on these rows are saved in RUN to compare with."
    mean = sum(row["difference"] for row in compared) / len(compared)
    lines = [
        f"Against the float32 grid saved in RUN: {mean:+.4f} on average.",
        "",
        f"subnet            float32 {dtype:>9}  difference",
    ]
    lines += [
        f"{row['subnet']:<16}{row['saved']:9.4f} {row['score']:9.4f}{row['difference']:+12.4f}"
        for row in compared
    ]
    return "\n".join(lines)
