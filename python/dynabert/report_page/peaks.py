"""What the machine can do at most, and what each kernel does of it.

A peak is measured, not read from a data sheet: on the CPU with the extension's own loops of
multiply-adds in registers, elsewhere with large matrix products. ``peak.json`` beside
``latency.json`` keeps peaks and kernels.

Letters: T tokens of the batch, C hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynabert.evaluation import evaluation_mode
from dynabert.flops import encoder_flops
from dynabert.json_file import read_json, write_json
from dynabert.latency_table import LatencySetting, LatencyTable
from dynabert.modeling_pretrained import DynaBertPreTrainedModel
from dynabert.subnet import LayerShape, SubnetShape
from dynabert_kernels import attention, ffn, use_backend
from dynabert_kernels._extension import cpu_extension
from dynabert_kernels.timing import measure

SCHEMA = 1
# The arithmetic a dtype is computed in, as the extension names it.
_ARITHMETIC = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
# Large enough that everything but the products themselves is below a percent of the time.
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Peak:
    """The highest rate measured on a machine.

    Attributes:
        hardware: As `LatencySetting.hardware`.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads together; for a GPU of no importance, and 0.
        dtype: Element type, as `LatencySetting.dtype`.
        flops_per_second: Operations per second, two per multiply-accumulate.
        how: What was measured, in words.
        measured_at: When, UTC, ISO 8601.
    """

    hardware: str
    device: str
    threads: int
    dtype: str
    flops_per_second: float
    how: str
    measured_at: str

    def holds_for(self, setting: LatencySetting) -> bool:
        """Whether a latency of this setting can be held against the peak."""
        return _key(self) == _peak_key(setting)


@dataclass(frozen=True)
class KernelRow:
    """One kernel at one width, called alone.

    Attributes:
        op: ``attention`` or ``ffn``: the whole sublayer.
        size: Heads, or neurons.
        median_ms: Half of the calls took at most this long, in milliseconds.
        flops: Operations of one call.
    """

    op: str
    size: int
    median_ms: float
    flops: int


@dataclass(frozen=True)
class KernelTable:
    """The kernels of one layer in one setting."""

    setting: LatencySetting
    rows: tuple[KernelRow, ...]


@dataclass(frozen=True)
class PeakFile:
    """The contents of ``peak.json``."""

    peaks: tuple[Peak, ...] = ()
    kernels: tuple[KernelTable, ...] = ()

    def peak(self, setting: LatencySetting) -> Peak | None:
        """What latencies of this setting are held against; None where it was not measured."""
        return next((peak for peak in self.peaks if peak.holds_for(setting)), None)

    def kernel_rows(self, setting: LatencySetting) -> tuple[KernelRow, ...]:
        """The kernels timed in this very setting, none where they were not."""
        return next((table.rows for table in self.kernels if table.setting == setting), ())

    def merged(self, newer: PeakFile) -> PeakFile:
        """Both, what is in `newer` in the place of what it measures again."""
        peaks = {_key(peak): peak for peak in (*self.peaks, *newer.peaks)}
        settings = [table.setting for table in newer.kernels]
        kept = [table for table in self.kernels if table.setting not in settings]
        return PeakFile(tuple(peaks.values()), (*kept, *newer.kernels))

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> PeakFile:
        """Read what `save` wrote; empty where there is no file.

        Raises:
            ValueError: The file does not hold peaks this version can read.
        """
        if not Path(path).exists():
            return cls()
        document = read_json(path, schema=SCHEMA)
        try:
            kernels = [
                KernelTable(
                    LatencySetting(**table["setting"]),
                    tuple(KernelRow(**row) for row in table["rows"]),
                )
                for table in document["kernels"]
            ]
            return cls(tuple(Peak(**peak) for peak in document["peaks"]), tuple(kernels))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"PeakFile: {path} cannot be read ({error!r}), expected what "
                "`dynabert report --measure-peak` writes. Remove the file and measure again."
            ) from error


def measure_peaks(
    model: DynaBertPreTrainedModel, tables: Sequence[LatencyTable], *, seconds: float = 1.0
) -> tuple[PeakFile, list[str]]:
    """Measure what the latencies of `tables` are held against, and the kernels on their own.

    Args:
        model: The model of the tables; untouched.
        tables: Tables of this machine; those of another one cannot be measured here.
        seconds: Time to spend on each peak, and on the kernels of each table.

    Returns:
        What was measured, and a sentence for each table that is left without a peak.
    """
    peaks: dict[tuple[str, str, int, str], Peak] = {}
    kernels = []
    missing = []
    for table in tables:
        setting = table.setting
        reason = setting.why_not_here()
        if reason is not None:
            missing.append(f"{setting.describe()}: no peak, {reason}")
            continue
        try:
            if _peak_key(setting) not in peaks:
                peaks[_peak_key(setting)] = measure_peak(setting, seconds)
        except (ImportError, NotImplementedError, ValueError) as error:
            missing.append(f"{setting.describe()}: no peak, {str(error).splitlines()[0]}")
            continue
        if not setting.lengths:  # the operations of a ragged batch are not on record
            kernels.append(measure_kernels(model, table, seconds))
    return PeakFile(tuple(peaks.values()), tuple(kernels)), missing


def measure_peak(setting: LatencySetting, seconds: float = 1.0) -> Peak:
    """The highest rate of this machine's arithmetic in the dtype and threads of `setting`.

    Raises:
        NotImplementedError: There is nothing to measure it with.
    """
    hardware, device, threads, dtype = _peak_key(setting)
    rate, how = _extension_rate(dtype, threads, seconds) if device == "cpu" else (None, "")
    if rate is None:
        rate, how = _product_rate(device, dtype, setting.threads, seconds)
    return Peak(hardware, device, threads, dtype, rate, how, _now())


def _extension_rate(dtype: str, threads: int, seconds: float) -> tuple[float | None, str]:
    """The rate of the extension's loop, None where there is no extension or no such instruction."""
    try:
        rate = float(cpu_extension().measure_peak(_ARITHMETIC[dtype], threads, seconds))
    except (ImportError, AttributeError, KeyError, ValueError):
        return None, ""
    return rate, f"{_ARITHMETIC[dtype]} multiply-adds in registers, the best moment"


def _product_rate(device: str, dtype: str, threads: int, seconds: float) -> tuple[float, str]:
    """The rate of large products by PyTorch."""
    size = _PRODUCT_SIZE[device]
    if dtype == "int8":
        raise NotImplementedError(
            f"measure_peak: dtype=int8 on {device}, expected float32, bfloat16 or float16. "
            "Nothing here measures the integer instructions."
        )
    left, right = (
        torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2)
    )
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timing = measure(
            {"product": partial(torch.mm, left, right)}, device=device, seconds=seconds
        )
    finally:
        torch.set_num_threads(former)
    fastest_s = min(timing["product"].samples_ms) / 1e3
    return 2 * size**3 / fastest_s, f"{size}^3 matrix products by PyTorch, the fastest"


def measure_kernels(
    model: DynaBertPreTrainedModel, table: LatencyTable, seconds: float = 1.0
) -> KernelTable:
    """Time attention and feed-forward of one layer, alone, at every width of the table's grid."""
    setting = table.setting
    timed = _as_timed(model, setting)
    shapes = [
        timed.subnet_shape(row.subnet)
        for row in table.rows
        if row.subnet.num_heads is row.subnet.intermediate_size is None
    ]
    heads = sorted({layer.num_heads for shape in shapes for layer in shape.layers})
    neurons = sorted({layer.intermediate_size for shape in shapes for layer in shape.layers})
    base: Any = timed.base_model
    layer = base.encoder.layer[0]
    generator = torch.Generator().manual_seed(0)
    tokens = setting.batch_size * setting.seq_len
    hidden = torch.randn(tokens, timed.config.hidden_size, generator=generator)
    weight = layer.attention.qkv_weight
    hidden = hidden.to(weight.device, weight.dtype)  # [T, C]
    offsets = torch.arange(0, tokens + 1, setting.seq_len, dtype=torch.int32, device=weight.device)
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    forced = None if setting.backend.startswith("auto") else setting.backend
    former = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        with use_backend(forced), evaluation_mode(timed), torch.no_grad():
            for count in heads:
                calls["attention", count] = partial(
                    attention,
                    hidden,
                    layer.attention.packed(),
                    num_heads=count,
                    cu_seqlens=offsets,
                    max_seqlen=setting.seq_len,
                )
            for count in neurons:
                calls["ffn", count] = partial(
                    ffn, hidden, layer.ffn.packed(), intermediate_size=count, cu_seqlens=offsets
                )
            named = {f"{op} {size}": call for (op, size), call in calls.items()}
            timings = measure(
                named, device=weight.device, seconds=seconds, warmup_seconds=min(0.2, seconds / 4)
            )
    finally:
        torch.set_num_threads(former)
    rows = [
        KernelRow(op, size, timings[f"{op} {size}"].median_ms, _flops(timed, setting, op, size))
        for op, size in calls
    ]
    return KernelTable(setting, tuple(rows))


def _as_timed(model: DynaBertPreTrainedModel, setting: LatencySetting) -> DynaBertPreTrainedModel:
    """A copy on the device and in the dtype of a table."""
    copied: DynaBertPreTrainedModel = copy.deepcopy(model)
    in_int8 = setting.dtype == "int8"
    dtype = torch.float32 if in_int8 else getattr(torch, setting.dtype)
    nn.Module.to(copied, device=setting.device, dtype=dtype)
    return copied.quantize("int8" if in_int8 else None)


def _flops(model: DynaBertPreTrainedModel, setting: LatencySetting, op: str, size: int) -> int:
    """Operations of one sublayer: those of a layer that has nothing else."""
    layer = LayerShape(0, size, 0) if op == "attention" else LayerShape(0, 0, size)
    shape = SubnetShape((layer,), (0, 1))
    return encoder_flops(model.config, shape, setting.seq_len, setting.batch_size)


def _key(peak: Peak) -> tuple[str, str, int, str]:
    return peak.hardware, peak.device, peak.threads, peak.dtype


def _peak_key(setting: LatencySetting) -> tuple[str, str, int, str]:
    """What a peak depends on: a GPU does not care for the host's threads."""
    threads = setting.threads if setting.device == "cpu" else 0
    return setting.hardware, setting.device, threads, setting.dtype


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
