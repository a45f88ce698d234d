"""The grid of a trained model: score, size, work and latency of every subnet, as tables and JSON.

`build_report` gathers, `render_grid` writes Markdown or plain text, `GridReport.save` and
`GridReport.load` keep ``grid.json``. `plot_pareto` draws it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from dynabert.data.examples import TaskSpec
from dynabert.evaluation import GridRow, grid_mean
from dynabert.flops import count_parameters, encoder_flops
from dynabert.json_file import read_json, write_json
from dynabert.latency import LatencyTable
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.pareto_plot import PlotPoint, draw_pareto
from dynabert.picking import pareto_front
from dynabert.subnet import SubnetConfig, SubnetShape

SCHEMA = 1
Style = Literal["markdown", "text"]
STYLES: tuple[Style, ...] = ("markdown", "text")
WIDTH_AXIS = "width (fraction of heads and neurons)"
DEPTH_AXIS = "depth (fraction of layers)"
_AXES = f"Rows: {WIDTH_AXIS}; columns: {DEPTH_AXIS}."
_NOTHING = "-"
# Factor, unit and decimals; a metric not named here is shown as it is.
METRIC_SCALES: dict[str, tuple[float, str, int]] = {
    "accuracy": (100.0, "%", 1),
    "exact_match": (100.0, "%", 1),
    "f1": (100.0, "%", 1),
    "f1_macro": (100.0, "%", 1),
    "mcc": (100.0, "x100", 1),
    "pearson": (100.0, "x100", 1),
    "precision": (100.0, "%", 1),
    "recall": (100.0, "%", 1),
    "spearman": (100.0, "x100", 1),
}


@dataclass(frozen=True)
class SubnetRecord:
    """Everything known about one subnet of a trained model.

    Attributes:
        subnet: The subnet.
        metrics: Every metric of the task, by name, as fractions; empty where the task has none.
        primary: The metric the task is judged by; None where the task has none.
        num_rows: Examples the metrics were computed on.
        num_layers: Layers it runs.
        num_heads: Heads of each of those layers.
        intermediate_size: Neurons of each of those layers.
        parameters: Scalars in an extracted model of this shape, embeddings and head included.
        flops: Operations of the encoder for one sequence of the report's length; see
            `dynabert.flops`.
        median_ms: Median latency in milliseconds; None where it was not measured, as the next two.
        p20_ms: 20th percentile of latency.
        p80_ms: 80th percentile of latency.
    """

    subnet: SubnetConfig
    metrics: Mapping[str, float]
    primary: float
    num_rows: int
    num_layers: int
    num_heads: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    parameters: int
    flops: int
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether the subnet is a cell of the grid of widths and depths."""
        subnet = self.subnet
        return subnet.num_heads is subnet.intermediate_size is subnet.layers is None


@dataclass(frozen=True)
class GridReport:
    """The grid of one trained model on one task.

    Attributes:
        task: Name of the task.
        primary_metric: Name of the metric the task is judged by.
        seq_len: Tokens per sequence that `SubnetRecord.flops` is counted for.
        rows: One record per subnet, largest first.
        latency_setting: What the latencies hold for, in a line; None where none were measured.
    """

    task: str
    primary_metric: str
    seq_len: int
    rows: tuple[SubnetRecord, ...]
    latency_setting: str | None = None

    @property
    def mean(self) -> float:
        """Mean of the primary metric over the grid of widths and depths; uneven subnets, which a
        search adds to it, count only where there are no others."""
        return grid_mean([row for row in self.rows if row.is_uniform] or self.rows)

    def with_latency(self, table: LatencyTable) -> GridReport:
        """A copy with the latencies of `table`; subnets it has not timed have none."""
        rows = []
        for record in self.rows:
            row = table.row(record.subnet)
            times = (row.median_ms, row.p20_ms, row.p80_ms) if row else (None, None, None)
            rows.append(replace(record, median_ms=times[0], p20_ms=times[1], p80_ms=times[2]))
        return replace(self, rows=tuple(rows), latency_setting=table.setting.describe())

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_json` is its inverse."""
        rows = [
            {**{f.name: getattr(row, f.name) for f in fields(row)}, "subnet": row.subnet.to_dict()}
            for row in self.rows
        ]
        return {
            "schema": SCHEMA,
            "task": self.task,
            "primary_metric": self.primary_metric,
            "mean": self.mean,
            "seq_len": self.seq_len,
            "latency_setting": self.latency_setting,
            "rows": rows,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GridReport:
        """Rebuild what `to_json` wrote.

        Raises:
            ValueError: A field is missing or not known.
        """
        try:
            rows = tuple(
                SubnetRecord(
                    **{
                        **row,
                        "subnet": SubnetConfig.from_dict(row["subnet"]),
                        "num_heads": tuple(row["num_heads"]),
                        "intermediate_size": tuple(row["intermediate_size"]),
                    }
                )
                for row in document["rows"]
            )
            return cls(
                task=document["task"],
                primary_metric=document["primary_metric"],
                seq_len=document["seq_len"],
                rows=rows,
                latency_setting=document["latency_setting"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"GridReport: document does not hold a grid ({error}), expected one written by "
                "GridReport.to_json. Evaluate the model again."
            ) from error

    def save(self, path: Path | str) -> None:
        """Write ``grid.json``, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> GridReport:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file does not hold a grid this version can read.
        """
        return cls.from_json(read_json(path, schema=SCHEMA))


def build_report(
    model: DynaBertPreTrainedModel,
    rows: Sequence[GridRow],
    spec: TaskSpec,
    *,
    seq_len: int = 128,
    latency: LatencyTable | None = None,
) -> GridReport:
    """Gather what is known about every evaluated subnet.

    Args:
        model: The model the rows were evaluated on; sizes and parameters are taken from it.
        rows: What `evaluate_grid` returned.
        spec: The task.
        seq_len: Tokens per sequence that the operations are counted for.
        latency: Latencies to add, of any of the subnets.

    Example:
        >>> report = build_report(model, evaluate_grid(...), spec)  # doctest: +SKIP
        >>> print(render_grid(report, "text"))  # doctest: +SKIP
        >>> report.save("run/grid.json")  # doctest: +SKIP
    """
    if not rows:
        raise ValueError("build_report: rows=[], expected at least one. Evaluate a subnet first.")
    records = []
    for row in rows:
        shape: SubnetShape = model.subnet_shape(row.subnet)
        records.append(
            SubnetRecord(
                subnet=row.subnet,
                metrics=dict(row.metrics),
                primary=row.primary,
                num_rows=row.num_rows,
                num_layers=len(shape.layers),
                num_heads=tuple(layer.num_heads for layer in shape.layers),
                intermediate_size=tuple(layer.intermediate_size for layer in shape.layers),
                parameters=count_parameters(model, shape),
                flops=encoder_flops(model.config, shape, seq_len),
            )
        )
    primary_metric = spec.primary_metric or next(iter(rows[0].metrics))
    report = GridReport(spec.name, primary_metric, seq_len, tuple(records))
    return report if latency is None else report.with_latency(latency)


def format_fraction(value: float) -> str:
    """A width or depth as people write it: ``1``, ``0.75``, ``2/3``."""
    if round(value, 2) == round(value, 6):
        return f"{value:g}"
    return str(Fraction(value).limit_denominator(48))


def render_grid(report: GridReport, style: Style = "markdown") -> str:
    """The report as text: score and latency by width and depth, then every number.

    Args:
        report: What to show.
        style: ``markdown``, or ``text`` with aligned columns for a terminal.

    Raises:
        ValueError: An unknown style.
    """
    if style not in STYLES:
        raise ValueError(
            f"render_grid: style={style!r}, expected {' or '.join(STYLES)}. markdown suits files."
        )
    shown = metric_label(report.primary_metric)
    scores = [_metric_value(report.primary_metric, row.primary) for row in report.rows]
    mean = _metric_value(report.primary_metric, report.mean)
    sections = [
        (f"Task {report.task}, {shown} on {report.rows[0].num_rows} rows, mean {mean}.", scores)
    ]
    if report.latency_setting is not None:
        milliseconds = _milliseconds(report, [row.median_ms for row in report.rows])
        sections.append((f"Median latency (ms): {report.latency_setting}.", milliseconds))
    tables = [(f"{about} {_AXES}", _matrix(report, cells)) for about, cells in sections]
    tables.append(_details(report))
    parts = []
    for heading, table in tables:
        parts.append(_filled(heading) if style == "text" else heading)
        if len(table) > 1:
            parts.append(_table(table, style))
    return "\n\n".join(parts) + "\n"


def _matrix(report: GridReport, values: Sequence[str]) -> list[list[str]]:
    """A header and one line per width, a column per depth; other subnets than these have no
    cell."""
    cells = {
        (format_fraction(row.subnet.width_mult), format_fraction(row.subnet.depth_mult)): value
        for row, value in zip(report.rows, values, strict=True)
        if row.is_uniform
    }
    depths = list(dict.fromkeys(depth for _, depth in cells))
    table = [[WIDTH_AXIS, *(f"depth {depth}" for depth in depths)]]
    for width in dict.fromkeys(width for width, _ in cells):
        table.append([width, *(cells.get((width, depth), _NOTHING) for depth in depths)])
    return table


def _details(report: GridReport) -> tuple[str, list[list[str]]]:
    """A heading, and a table with everything about each subnet."""
    rows = report.rows
    about = (
        f"Every subnet. GFLOPs are the encoder's for one sequence of {report.seq_len} tokens, "
        "two operations per multiply-accumulate."
    )
    columns: dict[str, list[str]] = {
        "width": [_fraction_or_nothing(row, row.subnet.width_mult) for row in rows],
        "depth": [_fraction_or_nothing(row, row.subnet.depth_mult) for row in rows],
        "layers": [str(row.num_layers) for row in rows],
        "heads": [_span(row.num_heads) for row in rows],
        "neurons": [_span(row.intermediate_size) for row in rows],
    }
    for name in rows[0].metrics:
        columns[metric_label(name)] = [_metric_value(name, row.metrics[name]) for row in rows]
    columns["parameters (M)"] = [f"{row.parameters / 1e6:.1f}" for row in rows]
    columns["GFLOPs"] = [f"{row.flops / 1e9:.2f}" for row in rows]
    if report.latency_setting is not None:
        full = max(rows, key=lambda row: row.parameters)
        front = _front(report)
        columns["latency (ms)"] = _milliseconds(report, [row.median_ms for row in rows])
        columns["p80 (ms)"] = _milliseconds(report, [row.p80_ms for row in rows])
        columns["speed-up"] = [_speed_up(full, row) for row in rows]
        columns["Pareto"] = ["*" if index in front else "" for index in range(len(rows))]
        about += (
            " Latency is the median, speed-up is over the largest subnet, "
            "* marks the Pareto front: nothing faster is as good."
        )
    return about, [list(columns), *(list(line) for line in zip(*columns.values(), strict=True))]


def plot_pareto(report: GridReport, path: Path | str) -> None:
    """Draw score against median latency, with the Pareto front, as a PNG.

    Args:
        report: What to draw, each subnet labelled (width, depth); at least one has a latency.
        path: File to write; replaced only once the picture is whole.

    Raises:
        ValueError: No subnet has a latency.
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    metric = report.primary_metric
    points = [
        PlotPoint(
            label=_plot_label(row),
            group=_depth_group(row),
            x=row.median_ms,
            x_range=None if row.p20_ms is None or row.p80_ms is None else (row.p20_ms, row.p80_ms),
            y=row.primary * METRIC_SCALES.get(metric, (1.0, "", 4))[0],
        )
        for row in report.rows
        if row.median_ms is not None
    ]
    if not points:
        raise ValueError(
            "plot_pareto: report has no latencies, expected one at least. "
            "Measure them and use GridReport.with_latency."
        )
    draw_pareto(
        points,
        path,
        title=f"{report.task}: every subnet, labelled (width, depth)\n{report.latency_setting}",
        x_label="latency of one batch, median (ms); bars from p20 to p80",
        y_label=metric_label(metric),
        front_label="Pareto front",
    )


def metric_label(name: str) -> str:
    return f"{name} ({METRIC_SCALES[name][1]})" if name in METRIC_SCALES else name


def _metric_value(name: str, value: float) -> str:
    factor, _, decimals = METRIC_SCALES.get(name, (1.0, "", 4))
    return f"{value * factor:.{decimals}f}"


def _milliseconds(report: GridReport, values: Sequence[float | None]) -> list[str]:
    """Times of a column, all with as many decimals as the fastest subnet of the report needs."""
    fastest = min((row.median_ms for row in report.rows if row.median_ms is not None), default=1.0)
    decimals = max(1, 2 - math.floor(math.log10(fastest)))
    return [_NOTHING if value is None else f"{value:.{decimals}f}" for value in values]


def _speed_up(full: SubnetRecord, row: SubnetRecord) -> str:
    if full.median_ms is None or row.median_ms is None:
        return _NOTHING
    return f"{full.median_ms / row.median_ms:.2f}x"


def _fraction_or_nothing(row: SubnetRecord, value: float) -> str:
    return format_fraction(value) if row.is_uniform else _NOTHING


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def _front(report: GridReport) -> list[int]:
    timed = [
        (index, row.median_ms, row.primary)
        for index, row in enumerate(report.rows)
        if row.median_ms is not None
    ]
    return [timed[i][0] for i in pareto_front([(ms, score) for _, ms, score in timed])]


def _depth_group(row: SubnetRecord) -> str:
    if not row.is_uniform:
        return "each layer its own width"
    layers = f"{row.num_layers} layer{'s' if row.num_layers != 1 else ''}"
    return f"depth {format_fraction(row.subnet.depth_mult)} ({layers})"


def _plot_label(row: SubnetRecord) -> str:
    if not row.is_uniform:
        return ""  # a name with numbers for each layer would cover its neighbours
    width, depth = (format_fraction(f) for f in (row.subnet.width_mult, row.subnet.depth_mult))
    return f"({width}, {depth})"


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, 100, break_on_hyphens=False)


def _table(lines: Sequence[Sequence[str]], style: Style) -> str:
    """Columns padded to their widest cell, the first to the left, the others to the right."""
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(sizes[0]), *map(str.rjust, line[1:], sizes[1:])] for line in lines]
    if style == "text":
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * sizes[0], *("-" * (size - 1) + ":" for size in sizes[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
