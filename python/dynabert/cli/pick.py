"""``dynabert pick``: the best subnet under a latency budget on this machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from dynabert.picking import Pick
    from dynabert.report import GridReport
    from dynabert.subnet import SubnetConfig


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
    if_none: Annotated[
        str,
        typer.Option(metavar="WHAT", help="Where no subnet fits: raise, or take the fastest."),
    ] = "raise",
    margin: Annotated[
        float, typer.Option(help="Share of the measured latency to keep free below the budget.")
    ] = 0.05,
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

    Measures, and says so, where RUN has no table of this machine, these versions and these options,
    or one that does not hold every evaluated subnet.
    """
    from dynabert.picking import IF_NONE, PERCENTILES, latency_here, pareto_subnets
    from dynabert.picking import pick as pick_subnet
    from dynabert.report import GridReport

    # Checked before anything is measured.
    if percentile not in PERCENTILES:
        raise ValueError(f"--percentile: {percentile!r}, expected one of {', '.join(PERCENTILES)}.")
    if if_none not in IF_NONE:
        raise ValueError(f"--if-none: {if_none!r}, expected {' or '.join(IF_NONE)}.")
    if not 0 < budget_ms < math.inf:
        raise ValueError(f"--budget-ms: {budget_ms}, expected a positive number of milliseconds.")
    if not 0 <= margin < math.inf:
        raise ValueError(f"--margin: {margin}, expected a share of 0 or more, such as 0.05.")
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
    table = latency_here(
        model,
        [row.subnet for row in report.rows],
        where.latency_json,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        device=device,
        dtype=element_type,
        backend=backend,
        seconds_per_subnet=seconds,
        keep=where.add_latency,
    )
    chosen = pick_subnet(report.rows, table, budget_ms, percentile, if_none=if_none, margin=margin)
    front = pareto_subnets(report.rows, table, percentile)
    document = {
        **asdict(chosen),
        "subnet": chosen.subnet.to_dict(),
        "setting": asdict(table.setting),
        "pareto": [{**asdict(each), "subnet": each.subnet.to_dict()} for each in front],
    }
    finish(f"{table.setting.describe()}\n{describe_pick(chosen, report)}", document, json_file)


def describe_pick(chosen: Pick, report: GridReport) -> str:
    """The choice in words, and as a line of Python."""
    found = f"within {chosen.budget_ms:g} ms"
    if not chosen.is_within:
        found = f"NOTHING is {found}; the fastest"
    return (
        f"{found}: {_in_words(chosen.subnet)}: {report.primary_metric} {chosen.primary:.4f}, "
        f"{chosen.latency_ms:.2f} ms ({chosen.percentile})\n"
        f"  model(..., subnet={_in_python(chosen.subnet)})"
    )


def _in_words(subnet: SubnetConfig) -> str:
    from dynabert.report import format_fraction

    parts = []
    if subnet.num_heads is None or subnet.intermediate_size is None:
        parts.append(f"width {format_fraction(subnet.width_mult)}")
    for name, value in (("heads", subnet.num_heads), ("neurons", subnet.intermediate_size)):
        if value is not None:
            parts.append(f"{name} {value if isinstance(value, int) else '/'.join(map(str, value))}")
    if subnet.layers is None:
        parts.append(f"depth {format_fraction(subnet.depth_mult)}")
    else:
        parts.append(f"layers {'/'.join(map(str, subnet.layers))}")
    return ", ".join(parts)


def _in_python(subnet: SubnetConfig) -> str:
    from dynabert.report import format_fraction

    given = {
        "width_mult": format_fraction(subnet.width_mult),
        "depth_mult": format_fraction(subnet.depth_mult),
        **{
            name: repr(value)
            for name in ("num_heads", "intermediate_size", "layers")
            if (value := getattr(subnet, name)) is not None
        },
    }
    if subnet.num_heads is not None and subnet.intermediate_size is not None:
        del given["width_mult"]
    if subnet.layers is not None:
        del given["depth_mult"]
    return f"SubnetConfig({', '.join(f'{name}={value}' for name, value in given.items())})"
