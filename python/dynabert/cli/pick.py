"""``dynabert pick``: the best subnet under a latency budget on this machine."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from dynabert.picking import Pick
    from dynabert.report import GridReport

_log = logging.getLogger(__name__)


@app.command()
def pick(
    place: options.Place,
    budget_ms: Annotated[
        float,
        typer.Option(help="Longest acceptable latency of one batch, in milliseconds."),
    ],
    percentile: Annotated[
        str, typer.Option(metavar="NAME", help="median, p20, p80 or p99 of the measured latencies.")
    ] = "p80",
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = 128,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = None,
    seconds: options.Seconds = 2.0,
    json_file: JsonFile = None,
) -> None:
    """Choose the most accurate evaluated subnet whose latency is within the budget.

    Measures, and says so, where RUN has no table of this machine, these versions and these options.
    """
    import torch

    from dynabert.latency import load_latency, measure_latency
    from dynabert.picking import PERCENTILES
    from dynabert.picking import pick as pick_subnet
    from dynabert.report import GridReport
    from dynabert_kernels.ops import forced_backend

    # Checked before anything is measured.
    if percentile not in PERCENTILES:
        raise ValueError(f"--percentile: {percentile!r}, expected one of {', '.join(PERCENTILES)}.")
    if not 0 < budget_ms < math.inf:
        raise ValueError(f"--budget-ms: {budget_ms}, expected a positive number of milliseconds.")
    where = ModelPlace.find(place)
    if not where.grid_json.exists():
        raise FileNotFoundError(
            f"{where.grid_json} is missing, expected the score of every subnet. "
            "Run `dynabert evaluate` first."
        )
    report = GridReport.load(where.grid_json)
    element_type = options.parse_dtype(dtype)
    device = options.parse_device(device)
    model = where.load_model()
    options.check_seq_len(seq_len, model.config.max_seq_len)
    setting: dict[str, Any] = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "threads": threads or torch.get_num_threads(),
        "device": device,
    }
    try:
        table = load_latency(
            where.latency_json,
            **setting,
            dtype=dtype,
            backend=backend or forced_backend() or "auto",
            model=model,
        )
    except (FileNotFoundError, ValueError) as reason:
        _log.info("measuring, since there is no table to use: %s", reason)
        table = measure_latency(
            model,
            [row.subnet for row in report.rows],
            **setting,
            dtype=element_type,
            backend=backend,
            seconds_per_subnet=seconds,
        )
        where.add_latency(table)
    chosen = pick_subnet(report.rows, table, budget_ms, percentile)
    document = {
        **asdict(chosen),
        "subnet": chosen.subnet.to_dict(),
        "setting": asdict(table.setting),
    }
    finish(f"{table.setting.describe()}\n{describe_pick(chosen, report)}", document, json_file)


def describe_pick(chosen: Pick, report: GridReport) -> str:
    """The choice in words, and as a line of Python."""
    from dynabert.report import format_fraction

    width = format_fraction(chosen.subnet.width_mult)
    depth = format_fraction(chosen.subnet.depth_mult)
    return (
        f"within {chosen.budget_ms:g} ms: width {width}, depth {depth}: "
        f"{report.primary_metric} {chosen.primary:.4f}, "
        f"{chosen.latency_ms:.2f} ms ({chosen.percentile})\n"
        f"  model(..., subnet=SubnetConfig(width_mult={width}, depth_mult={depth}))"
    )
