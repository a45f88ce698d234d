"""Latencies of subnets as a table that says what it holds for.

`dynabert.latency` measures tables, `dynabert.latency_file` keeps them in a file.
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
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import Count, SubnetConfig
from dynabert_kernels._extension import cpu_extension, extension_error
from dynabert_kernels.ops import OPS

AUTOMATIC = "auto"
"""How the name of a backend begins that was chosen automatically."""


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
        seq_len: Tokens per sequence, where lengths vary the most there are.
        model: Class and sizes of the full network.
        versions: What `package_versions` said.
        lengths: Where lengths vary, what they are those of (`dynabert.latency_lengths`); empty
            where every sequence has `seq_len` tokens.
        captured: Whether calls replayed CUDA graphs (`DynaBertPreTrainedModel.capture`).
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
    lengths: str = ""
    captured: bool = False

    def describe(self) -> str:
        """One line for a caption: batch, tokens, dtype, backend, threads, hardware."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        tokens = f"batch {self.batch_size} x {self.seq_len} tokens"
        if self.lengths:
            tokens = f"batch {self.batch_size}, at most {self.seq_len} tokens ({self.lengths})"
        graphs = " in CUDA graphs" if self.captured else ""
        return f"{tokens}, {self.dtype}, {self.backend} backend{graphs}, {threads}, {self.hardware}"

    def why_not_here(self) -> str | None:
        """Why the numbers do not hold here, in a clause; None if they do."""
        here = hardware_name(self.device)
        if self.hardware != here:
            return f"it was measured on {self.hardware}, and this machine has {here}"
        if self.backend.startswith(AUTOMATIC):
            now = automatic_backend(torch.device(self.device))
            if self.backend != now:
                return f"it was measured with backend {self.backend}, now {now}"
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
        throughput: Sequences per second: at the median, or where lengths vary over all samples.
        measured_at: When, UTC, ISO 8601.
        peak_memory_mib: Most memory a call needed beyond what was there before it, in MiB, on the
            device that ran it (`dynabert.latency_memory`); None where that cannot be told.
        outliers: Share of the samples that took far longer than the others of the same batch.
        tokens_per_second: Real tokens per second, as `throughput`; None in a table that does not
            say.
    """

    subnet: SubnetConfig
    median_ms: float
    p20_ms: float
    p80_ms: float
    p99_ms: float
    num_samples: int
    throughput: float
    measured_at: str
    peak_memory_mib: float | None = None
    outliers: float = 0.0
    tokens_per_second: float | None = None

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
    """Versions of the packages latency depends on, by name, and what the CPU kernels run on."""
    versions = {
        "dynabert-kernels": dynabert_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if extension_error() is None:
        versions["instruction set"] = cpu_extension().isa_name()
    return versions


def describe_model(model: DynaBertPreTrainedModel) -> str:
    """Class and sizes of a model: what its latency depends on, whatever its weights."""
    config = model.config
    heads, neurons = _listed(config.head_counts), _listed(config.neuron_counts)
    size = f"hidden size {config.hidden_size}"
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        size += f", head size {config.head_dim}"
    layers = config.num_hidden_layers
    return f"{type(model).__name__}: {layers} layers, {heads} heads, {neurons} neurons, {size}"


def _listed(count: Count) -> str:
    return str(count) if isinstance(count, int) else ".".join(map(str, count))


def automatic_backend(device: torch.device) -> str:
    """``auto`` and, in brackets, the best backend each operator has on the device."""
    best = {
        name: next(backend for backend, reason in op.status(device) if reason is None)
        for name, op in OPS.items()
    }
    if len(set(best.values())) == 1:
        return f"{AUTOMATIC} ({next(iter(best.values()))})"
    return f"{AUTOMATIC} ({', '.join(f'{name}: {backend}' for name, backend in best.items())})"
