"""Everything the page shows, as one JSON document.

The page computes nothing that it could be given: what depends on no choice of the reader is
computed here, and the numbers are those of ``grid.json`` and ``latency.json``, unrounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from dynabert.flops import count_parameters, encoder_flops
from dynabert.latency_table import (
    LatencySetting,
    LatencyTable,
    describe_model,
    hardware_name,
    package_versions,
)
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.picking import MARGIN
from dynabert.report import (
    DEPTH_AXIS,
    METRIC_SCALES,
    WIDTH_AXIS,
    GridReport,
    SubnetRecord,
    format_fraction,
    metric_label,
)
from dynabert.report_page.peaks import Peak, PeakFile
from dynabert.subnet import SubnetConfig, SubnetShape

SCHEMA = 1


@dataclass(frozen=True)
class Command:
    """A command the reader can repeat.

    Attributes:
        title: What it does.
        text: The command, quoted for a shell.
        notes: What the command alone does not say, a sentence each.
    """

    title: str
    text: str
    notes: tuple[str, ...] = ()


def _no_command(setting: LatencySetting) -> str:
    return ""


@dataclass(frozen=True)
class Sources:
    """What a page is made of.

    Attributes:
        name: What the model is called, for instance the name of its folder.
        model: The model; its sizes are read.
        grid: Scores; None where nothing was evaluated.
        tables: Latencies, of this machine and of others.
        peaks: What they are held against.
        run: Contents of ``run.json``; None for a model alone.
        stages: Contents of the ``stage.json`` files, in order.
        commands: Commands that made the run.
        latency_command: Of a table's setting the command that measures it; "" for none.
        pick_command: The command that picks from the table, without budget and percentile.
    """

    name: str
    model: DynaBertPreTrainedModel
    grid: GridReport | None = None
    tables: Sequence[LatencyTable] = ()
    peaks: PeakFile = field(default_factory=PeakFile)
    run: Mapping[str, Any] | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    commands: Sequence[Command] = ()
    latency_command: Callable[[LatencySetting], str] = _no_command
    pick_command: Callable[[LatencySetting], str] = _no_command


def build_document(sources: Sources) -> dict[str, Any]:
    """Gather the document, ready for JSON.

    Tables of a model of another class or size are left out, and named under ``left_out``.
    """
    model, grid = sources.model, sources.grid
    own = describe_model(model)
    fits = [table.setting.model == own for table in sources.tables]
    tables = [table for table, fit in zip(sources.tables, fits, strict=True) if fit]
    subnets = _all_subnets(grid, tables)
    seq_len = grid.seq_len if grid else max((t.setting.seq_len for t in tables), default=128)
    shapes = {name: model.subnet_shape(subnet) for name, subnet in subnets.items()}
    records = {row.subnet.name: row for row in grid.rows} if grid else {}
    index = {name: place for place, name in enumerate(subnets)}
    return {
        "schema": SCHEMA,
        "name": sources.name,
        "task": grid.task if grid else (sources.run or {}).get("task"),
        "made": {
            "at": _now(),
            "on": hardware_name("cpu"),
            "versions": package_versions(),
        },
        "metric": _metric(grid),
        "other_metrics": _other_metrics(grid),
        "seq_len": seq_len,
        "margin": MARGIN,
        "axes": {"width": WIDTH_AXIS, "depth": DEPTH_AXIS},
        "subnets": [
            _subnet(model, subnet, label, shapes[name], records.get(name), seq_len)
            for (name, subnet), label in zip(subnets.items(), _labels(subnets), strict=True)
        ],
        "tables": [_table(sources, table, index, shapes) for table in tables],
        "left_out": [
            f"{table.setting.describe()}: of another model, {table.setting.model}"
            for table, fit in zip(sources.tables, fits, strict=True)
            if not fit
        ],
        "facts": _facts(sources, own),
        "stages": [_stage(stage, grid) for stage in sources.stages],
        "commands": [asdict(command) for command in sources.commands],
    }


def _all_subnets(
    grid: GridReport | None, tables: Sequence[LatencyTable]
) -> dict[str, SubnetConfig]:
    """Those of the grid, in its order, and then those that were only timed, by name."""
    scored = [row.subnet for row in grid.rows] if grid else []
    timed = [row.subnet for table in tables for row in table.rows]
    subnets: dict[str, SubnetConfig] = {}
    for subnet in (*scored, *timed):
        subnets.setdefault(subnet.name, subnet)
    return subnets


def _metric(grid: GridReport | None) -> dict[str, Any] | None:
    """How scores are named and written; None where there are none."""
    if grid is None:
        return None
    return {
        **_written(grid.primary_metric),
        "num_rows": grid.rows[0].num_rows,
        "mean": grid.mean,
    }


def _other_metrics(grid: GridReport | None) -> list[dict[str, Any]]:
    names = grid.rows[0].metrics if grid else ()
    return [_written(name) for name in names if grid and name != grid.primary_metric]


def _written(metric: str) -> dict[str, Any]:
    """How values of a metric are written: times `factor`, with so many decimals, and the unit."""
    factor, unit, decimals = METRIC_SCALES.get(metric, (1.0, "", 4))
    return {
        "name": metric,
        "label": metric_label(metric),
        "factor": factor,
        "unit": unit,
        "decimals": decimals,
    }


def _is_uniform(subnet: SubnetConfig) -> bool:
    return subnet.num_heads is subnet.intermediate_size is subnet.layers is None


def _labels(subnets: Mapping[str, SubnetConfig]) -> list[str]:
    """Short names: (width, depth); the others are counted, S1 the first."""
    labels = []
    searched = 0
    for subnet in subnets.values():
        if _is_uniform(subnet):
            width, depth = format_fraction(subnet.width_mult), format_fraction(subnet.depth_mult)
            labels.append(f"({width}, {depth})")
        else:
            searched += 1
            labels.append(f"S{searched}")
    return labels


def _subnet(
    model: DynaBertPreTrainedModel,
    subnet: SubnetConfig,
    label: str,
    shape: SubnetShape,
    record: SubnetRecord | None,
    seq_len: int,
) -> dict[str, Any]:
    uniform = _is_uniform(subnet)
    width, depth = format_fraction(subnet.width_mult), format_fraction(subnet.depth_mult)
    return {
        "name": subnet.name,
        "label": label,
        "call": f"SubnetConfig({_arguments(subnet)})",
        "is_uniform": uniform,
        "width": width if uniform else None,
        "depth": depth if uniform else None,
        "layers": [
            {
                "index": layer.index,
                "num_heads": layer.num_heads,
                "intermediate_size": layer.intermediate_size,
            }
            for layer in shape.layers
        ],
        "score": None if record is None else record.primary,
        "metrics": {} if record is None else dict(record.metrics),
        "parameters": count_parameters(model, shape),
        "flops": encoder_flops(model.config, shape, seq_len),
    }


def _arguments(subnet: SubnetConfig) -> str:
    """The subnet's own arguments in Python; those that are as by default are left out."""
    given = []
    for name in ("width_mult", "depth_mult"):
        value = getattr(subnet, name)
        if value != 1.0:
            given.append(f"{name}={format_fraction(value)}")
    for name in ("num_heads", "intermediate_size", "layers"):
        value = getattr(subnet, name)
        if value is not None:
            given.append(f"{name}={value}")
    return ", ".join(given)


def _table(
    sources: Sources,
    table: LatencyTable,
    index: Mapping[str, int],
    shapes: Mapping[str, SubnetShape],
) -> dict[str, Any]:
    setting, peaks = table.setting, sources.peaks
    peak = peaks.peak(setting)
    rows = []
    for row in table.rows:
        flops = encoder_flops(
            sources.model.config, shapes[row.subnet.name], setting.seq_len, setting.batch_size
        )
        rows.append(
            {
                "subnet": index[row.subnet.name],
                "median": row.median_ms,
                "p20": row.p20_ms,
                "p80": row.p80_ms,
                "p99": row.p99_ms,
                "throughput": row.throughput,
                "num_samples": row.num_samples,
                "measured_at": row.measured_at,
                "peak_memory_mib": row.peak_memory_mib,
                # The operations of a ragged batch are not on record.
                **_rate(None if setting.lengths else flops, row.median_ms, peak),
            }
        )
    return {
        "setting": asdict(setting),
        "caption": setting.describe(),
        "foreign": setting.why_not_here(),
        "facets": _facets(setting),
        "latency_command": sources.latency_command(setting),
        "pick_command": sources.pick_command(setting),
        "peak": None if peak is None else asdict(peak),
        "rows": rows,
        "kernels": [
            {
                "op": kernel.op,
                "size": kernel.size,
                "median": kernel.median_ms,
                **_rate(kernel.flops, kernel.median_ms, peak),
            }
            for kernel in peaks.kernel_rows(setting)
        ],
    }


def _rate(flops: int | None, median_ms: float, peak: Peak | None) -> dict[str, float | None]:
    """Operations per second, and their share of the peak."""
    if flops is None:
        return {"rate": None, "share": None}
    rate = flops / (median_ms / 1e3)
    return {"rate": rate, "share": None if peak is None else rate / peak.flops_per_second}


def _facets(setting: LatencySetting) -> dict[str, str]:
    """What a reader chooses tables by, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in setting.versions.items())
    return {
        "device": setting.hardware,
        "batch_size": str(setting.batch_size),
        "length": setting.lengths or f"{setting.seq_len} tokens",
        "dtype": setting.dtype,
        "backend": f"{setting.backend}{', CUDA graphs' if setting.captured else ''}",
        "threads": str(setting.threads),
        "versions": versions,
    }


def _facts(sources: Sources, own: str) -> list[list[str]]:
    """What there is to know about the run, as pairs of a name and a text."""
    grid, run = sources.grid, sources.run
    facts = [["Model", own]]
    if grid is not None:
        facts.append(["Scores", f"{grid.task}, {grid.rows[0].num_rows:,} rows"])
    if run is None:
        return facts
    data, numerics = run.get("data", {}), run.get("numerics", {})
    facts.append(["Started from", str(run.get("model"))])
    if data:
        facts.append(["Data", str(data.get("source"))])
        facts.append(
            [
                "Rows read",
                f"{data.get('train_rows', 0):,} to train on, "
                f"{data.get('validation_rows', 0):,} to validate on",
            ]
        )
        facts.append(["Digest of the data", str(data.get("fingerprint"))])
    if numerics:
        facts.append(
            [
                "Trained on",
                f"{numerics.get('hardware')}, CPU threads: {numerics.get('threads')}, "
                f"{'bfloat16' if numerics.get('bf16') else 'float32'}",
            ]
        )
    versions = [f"{name} {version}" for name, version in run.get("versions", {}).items()]
    facts.append(["Trained with", ", ".join(versions)])
    return facts


def _stage(stage: Mapping[str, Any], grid: GridReport | None) -> dict[str, Any]:
    """One stage of training: its length, its mean score, and what rewiring did first."""
    metrics = stage.get("metrics") or {}
    rewiring = stage.get("rewiring") or {}
    name = grid.primary_metric if grid else ""
    before, after = rewiring.get("before") or {}, rewiring.get("after") or {}
    return {
        "name": stage.get("name"),
        "teacher": stage.get("teacher"),
        "num_subnets": len(stage.get("subnets") or []),
        "steps": stage.get("steps"),
        "seconds": stage.get("seconds"),
        "grid_mean": metrics.get("grid_mean"),
        "rewiring": [
            {"subnet": subnet, "before": scores.get(name), "after": after[subnet].get(name)}
            for subnet, scores in before.items()
            if subnet in after and name in scores
        ],
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
