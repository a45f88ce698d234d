"""``dynabert latency``: how long every subnet takes on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynabert.cli import _options as options
from dynabert.cli._app import JsonFile, app, finish
from dynabert.cli._place import ModelPlace

if TYPE_CHECKING:
    from dynabert.latency_table import LatencyTable


@app.command()
def latency(
    place: options.Place,
    batch_size: options.BatchSize = 1,
    seq_len: options.SeqLen = 128,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    backend: options.Backend = None,
    widths: options.Widths = None,
    depths: options.Depths = None,
    seconds: options.Seconds = 2.0,
    json_file: JsonFile = None,
) -> None:
    """Time the forward pass of every subnet, without padding, and keep the table beside the model.

    Writes latency.json into RUN and, where the grid has been evaluated, grid.json, grid.md and
    grid.png with latencies.
    """
    from dynabert.latency import measure_latency

    where = ModelPlace.find(place)
    element_type = options.parse_dtype(dtype)
    device = options.parse_device(device)
    grid = (
        options.parse_fractions("--widths", widths),
        options.parse_fractions("--depths", depths),
    )
    model = where.load_model()
    options.check_seq_len(seq_len, model.config.max_seq_len)
    table = measure_latency(
        model,
        where.subnets(model, *grid),
        batch_size=batch_size,
        seq_len=seq_len,
        threads=threads,
        device=device,
        dtype=element_type,
        backend=backend,
        seconds_per_subnet=seconds,
    )
    where.add_latency(table)
    finish(render_latency(table), table.to_dict(), json_file)


def render_latency(table: LatencyTable) -> str:
    """The table as text for a terminal."""
    from dynabert.report import format_fraction

    lines = [table.setting.describe(), ""]
    lines.append("width  depth   median      p20      p80      p99  sequences/s   (ms)")
    for row in table.rows:
        times = "".join(f"{ms:9.2f}" for ms in (row.median_ms, row.p20_ms, row.p80_ms, row.p99_ms))
        width, depth = (
            format_fraction(value) for value in (row.subnet.width_mult, row.subnet.depth_mult)
        )
        lines.append(f"{width:<7}{depth:<6}{times}{row.throughput:13.1f}")
    return "\n".join(lines)
