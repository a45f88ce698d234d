"""``dynabert latency``: how long every subnet takes on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from pathlib import Path

    from dynabert.latency_lengths import Lengths
    from dynabert.latency_table import LatencyRow, LatencyTable
    from dynabert.subnet import SubnetConfig


@app.command()
def latency(
    place: options.Place,
    protocol: options.Protocol = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per forward pass; default: 1.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence; default: 128.")] = None,
    lengths_from: options.LengthsFrom = None,
    text_column: options.TextColumn = "text",
    pair_column: options.PairColumn = None,
    threads: options.Threads = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; default: cpu.")
    ] = None,
    dtype: options.Dtype = "float32",
    backend: options.Backend = None,
    capture: Annotated[
        bool, typer.Option("--capture", help="Replay CUDA graphs; needs a GPU.")
    ] = False,
    widths: options.Widths = None,
    depths: options.Depths = None,
    subnets: options.Subnets = None,
    seconds: options.Seconds = 2.0,
    samples: Annotated[
        int | None,
        typer.Option(help="Calls to time of each subnet, whatever time they take."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the forward pass of every subnet, without padding, and keep the table beside the model.

    Adds to latency.json in RUN and, where the grid has been evaluated, writes grid.json, grid.md
    and grid.png with latencies.
    """
    from dynabert.latency import measure_latency
    from dynabert.latency_file import check_latency_file
    from dynabert.latency_protocols import Protocol, find_protocol

    where = ModelPlace.find(place)
    usual = Protocol("cpu", 1, 128) if protocol is None else find_protocol(protocol)
    batch_size = usual.batch_size if batch_size is None else batch_size
    seq_len = usual.seq_len if seq_len is None else seq_len
    samples = usual.num_samples if samples is None else samples
    element_type = options.parse_dtype(dtype)
    device = options.parse_device(usual.device if device is None else device)
    check_latency_file(where.latency_json)  # before time is spent on what it could not take
    grid = (
        options.parse_fractions("--widths", widths),
        options.parse_fractions("--depths", depths),
    )
    chosen = None if subnets is None else options.parse_subnets(subnets)
    if chosen is not None and grid != (None, None):
        raise ValueError(
            "--subnets: given beside --widths or --depths, expected one or the other. Leave out "
            "what is not to be timed."
        )
    model = where.load_model()
    options.check_seq_len(seq_len, model.config.max_seq_len)
    if chosen is None:
        chosen = where.subnets(model, *grid)
        chosen += where.uneven_subnets() if grid == (None, None) else []
    table = measure_latency(
        model,
        chosen,
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        device=device,
        dtype=element_type,
        backend=backend,
        seconds_per_subnet=seconds,
        lengths=_lengths(where, lengths_from, seq_len, text_column, pair_column),
        num_samples=samples,
        capture=capture,
    )
    where.add_latency(table)
    finish(render_latency(table), table.to_dict(), json_file)


def _lengths(
    where: ModelPlace,
    path: Path | None,
    seq_len: int,
    text_column: str,
    pair_column: str | None,
) -> Lengths | None:
    if path is None:
        return None
    from transformers import AutoTokenizer

    from dynabert.latency_lengths import read_lengths

    return read_lengths(
        path,
        AutoTokenizer.from_pretrained(where.model_dir),
        seq_len=seq_len,
        text_column=text_column,
        pair_column=pair_column,
    )


def render_latency(table: LatencyTable) -> str:
    """The table as text for a terminal."""
    from dynabert.subnet import SubnetConfig

    subnets = [row.subnet for row in table.rows]
    by_fraction = all(each == SubnetConfig(each.width_mult, each.depth_mult) for each in subnets)
    names = [_fractions(each) if by_fraction else each.name for each in subnets]
    heads = ["width  depth" if by_fraction else "subnet", "median", "p20", "p80", "p99"]
    heads += ["sequences/s", "tokens/s", "memory", "outliers"]
    lines = [heads, *([name, *_cells(row)] for name, row in zip(names, table.rows, strict=True))]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([line[0].ljust(sizes[0]), *map(str.rjust, line[1:], sizes[1:])]) for line in lines
    ]
    about = "Times in ms; memory in MiB that a call needs beyond what was there before it."
    return "\n".join([table.setting.describe(), "", *aligned, "", about])


def _fractions(subnet: SubnetConfig) -> str:
    from dynabert.report import format_fraction

    return f"{format_fraction(subnet.width_mult):<7}{format_fraction(subnet.depth_mult)}"


def _cells(row: LatencyRow) -> list[str]:
    times = [f"{ms:.2f}" for ms in (row.median_ms, row.p20_ms, row.p80_ms, row.p99_ms)]
    tokens = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
    memory = "-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.1f}"
    return [*times, f"{row.throughput:.1f}", tokens, memory, f"{row.outliers:.0%}"]
