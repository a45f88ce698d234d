"""Latencies of subnets as a table that says what it holds for, and the file that keeps such tables.

``latency.json`` lies beside a model and gathers tables of any number of settings: machines, batch
sizes, dtypes, backends. What was measured elsewhere, or with other versions, is refused by name.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers

import dynabert_kernels
from dynabert.json_file import read_json, write_json
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import SubnetConfig

SCHEMA = 1


@dataclass(frozen=True)
class LatencySetting:
    """What a latency holds for; two tables are comparable when they differ in one field only.

    Attributes:
        hardware: Name of the processor, and of the GPU when one ran the model.
        device: ``cpu`` or ``cuda``.
        threads: Threads PyTorch used on the CPU.
        backend: Backend the operators were forced to, or ``auto``.
        dtype: Element type of weights and activations, for instance ``float32``; ``int8`` where
            the matrix products are in integers and the rest in float32.
        batch_size: Sequences per forward pass.
        seq_len: Tokens per sequence.
        model: Class and sizes of the full network.
        versions: Versions of the packages the numbers depend on, by name.
    """

    hardware: str
    device: str
    threads: int
    backend: str
    dtype: str
    batch_size: int
    seq_len: int
    model: str
    versions: Mapping[str, str]

    def describe(self) -> str:
        """One line for a caption: batch, tokens, dtype, backend, threads, hardware."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return (
            f"batch {self.batch_size} x {self.seq_len} tokens, {self.dtype}, "
            f"{self.backend} backend, {threads}, {self.hardware}"
        )

    def why_not_here(self) -> str | None:
        """Why the numbers do not hold here, in a clause; None if they do."""
        here = hardware_name(self.device)
        if self.hardware != here:
            return f"it was measured on {self.hardware}, and this machine has {here}"
        changed = [
            f"{name} {self.versions.get(name, 'absent')}, now {version}"
            for name, version in package_versions().items()
            if self.versions.get(name) != version
        ]
        return f"it was measured with {'; '.join(changed)}" if changed else None


@dataclass(frozen=True)
class LatencyRow:
    """Latency of one subnet; times of one forward pass of the whole batch, in milliseconds.

    Attributes:
        subnet: What was timed.
        median_ms: Half of the samples took at most this long.
        p20_ms: A fifth took at most this long.
        p80_ms: Four fifths took at most this long.
        p99_ms: 99 of 100 took at most this long.
        num_samples: Samples taken, all of them counted.
        throughput: Sequences per second at the median.
        measured_at: When, UTC, ISO 8601.
    """

    subnet: SubnetConfig
    median_ms: float
    p20_ms: float
    p80_ms: float
    p99_ms: float
    num_samples: int
    throughput: float
    measured_at: str

    def at(self, percentile: str) -> float:
        """The latency in milliseconds at ``median``, ``p20``, ``p80`` or ``p99``."""
        return float(getattr(self, f"{percentile}_ms"))


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of several subnets in one setting."""

    setting: LatencySetting
    rows: tuple[LatencyRow, ...]

    def row(self, subnet: SubnetConfig) -> LatencyRow | None:
        """The row of `subnet`, None if it was not timed; by name, so 2/3 and 0.6667 are one."""
        return next((row for row in self.rows if row.subnet.name == subnet.name), None)

    def merged(self, newer: LatencyTable) -> LatencyTable:
        """Rows of both, those of `newer` in the place of rows of the same subnet."""
        assert self.setting == newer.setting, "tables of different settings do not mix"
        kept = [newer.row(row.subnet) or row for row in self.rows]
        added = [row for row in newer.rows if self.row(row.subnet) is None]
        return LatencyTable(self.setting, (*kept, *added))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is its inverse."""
        rows = [
            {
                "subnet": row.subnet.to_dict(),
                **{f.name: getattr(row, f.name) for f in fields(row) if f.name != "subnet"},
            }
            for row in self.rows
        ]
        return {"setting": asdict(self.setting), "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyTable:
        """Rebuild what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: A field is missing or of another type.
        """
        rows = [
            LatencyRow(**{**row, "subnet": SubnetConfig.from_dict(row["subnet"])})
            for row in values["rows"]
        ]
        return cls(LatencySetting(**values["setting"]), tuple(rows))


def hardware_name(device: torch.device | str) -> str:
    """The processor, after the GPU if `device` is one: batch-1 latency depends on both."""
    cpu = f"{_cpu_model()} ({os.cpu_count()} cores)"
    if torch.device(device).type != "cuda":
        return cpu
    gpu = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"
    return f"{gpu} beside {cpu}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of the packages latency depends on, by name."""
    return {
        "dynabert-kernels": dynabert_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save_latency(table: LatencyTable, path: Path | str) -> None:
    """Add a table to ``latency.json``, whole or not at all.

    A table of the same setting keeps its rows, save those of subnets timed again; tables of other
    settings stay.

    Raises:
        ValueError: The file exists and is not a latency file this version can read.
    """
    path = Path(path)
    tables = _read_tables(path) if path.exists() else []
    same = [index for index, kept in enumerate(tables) if kept.setting == table.setting]
    if same:
        tables[same[0]] = tables[same[0]].merged(table)
    else:
        tables.append(table)
    write_json(path, {"schema": SCHEMA, "tables": [kept.to_dict() for kept in tables]})


def load_latency(
    path: Path | str,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    model: DynaBertPreTrainedModel | None = None,
    allow_foreign: bool = False,
) -> LatencyTable:
    """The table of ``latency.json`` that holds here and for what is asked.

    A table holds here if this machine and the versions of now made it.

    Args:
        path: The file `save_latency` wrote.
        batch_size: Only tables of this many sequences; None for any, here and below.
        seq_len: Only tables of this many tokens per sequence.
        device: Only tables of ``cpu`` or ``cuda``.
        threads: Only tables of this many CPU threads.
        dtype: Only tables of this element type, for instance ``float32``.
        backend: Only tables of this backend; ``auto`` for whatever was chosen automatically.
        model: Only tables of a model of this class and size.
        allow_foreign: Also take a table of another machine or other versions, when none is of this
            one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a latency file, no table fits, or more than one does; the
            message says why not or between which to choose.
    """
    fields_asked = {
        "batch_size": batch_size,
        "seq_len": seq_len,
        "device": device,
        "threads": threads,
        "dtype": dtype,
        "backend": backend,
        "model": None if model is None else describe_model(model),
    }
    wanted = {name: value for name, value in fields_asked.items() if value is not None}
    asked = ", ".join(f"{name}={value}" for name, value in wanted.items()) or "any setting"
    tables = [table for table in _read_tables(Path(path)) if _holds(table.setting, wanted)]
    if not tables:
        raise ValueError(
            f"load_latency: {path} has no table with {asked}. Measure one with `dynabert latency`."
        )
    reasons = [table.setting.why_not_here() for table in tables]
    here = [table for table, reason in zip(tables, reasons, strict=True) if reason is None]
    if not here and not allow_foreign:
        raise ValueError(
            f"load_latency: {path} does not hold for this machine: {reasons[-1]}. "
            "Measure again with `dynabert latency`, or allow a foreign table."
        )
    fitting = here or tables
    if len(fitting) > 1:
        listed = "".join(
            f"\n  {table.setting.describe()}" + (f" ({reason})" if reason else "")
            for table, reason in zip(tables, reasons, strict=True)
            if table in fitting
        )
        raise ValueError(
            f"load_latency: {path} has {len(fitting)} tables with {asked}, expected one. "
            f"Say which:{listed}"
        )
    return fitting[0]


def describe_model(model: DynaBertPreTrainedModel) -> str:
    """Class and sizes of a model: what its latency depends on, whatever its weights."""
    config = model.config
    return (
        f"{type(model).__name__}: {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, {config.intermediate_size} neurons, "
        f"hidden size {config.hidden_size}"
    )


def _read_tables(path: Path) -> list[LatencyTable]:
    document = read_json(path, schema=SCHEMA)
    try:
        return [LatencyTable.from_dict(table) for table in document["tables"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_latency: {path} holds a table that cannot be read ({error!r}), expected what "
            "`dynabert latency` writes. Remove the file and measure again."
        ) from error


def _holds(setting: LatencySetting, wanted: Mapping[str, str | int]) -> bool:
    for name, value in wanted.items():
        got = getattr(setting, name)
        if got != value and not (name == "backend" and got.startswith(f"{value} (")):
            return False
    return True
