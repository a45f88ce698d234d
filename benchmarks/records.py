"""JSON-lines records of measurements: one row per case and peer, flushed as it is taken.

A row carries everything needed to read it alone: what ran (`section`, `case`, `peer`, `dtype`,
`shape`, `subnet`), the timing (`median_ms`, `p20_ms`, `p80_ms`, `n`), the achieved rates with
their share of the ceiling measured on the same machine, and where it ran (`machine`). A row
whose case failed, or whose output did not match the reference, has `error` and no timing.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynabert_kernels.timing import Timing

RECORD_NAME = "rows.jsonl"


def timing_row(timing: Timing) -> dict[str, float | int]:
    """A timing's fields of a row."""
    return {
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "n": timing.num_samples,
    }


@dataclass
class Deadline:
    """Wall-clock budget shared by the sections of one process."""

    budget_s: float
    started: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Seconds left; negative once the budget is spent."""
        return self.budget_s - (time.monotonic() - self.started)

    def spent_s(self) -> float:
        """Seconds since the deadline was set."""
        return time.monotonic() - self.started


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unavailable: {error}"
    return done.stdout.strip() if done.returncode == 0 else f"unavailable: {done.stderr.strip()}"


def commit_of_checkout() -> str:
    """Commit of the checkout this file lies in, or "unknown" (a copied tree has no git)."""
    folder = str(Path(__file__).resolve().parent)
    text = _output_of("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    return "unknown" if text.startswith("unavailable") or not text else text


def describe_machine(device: str, *, with_libraries: bool = True) -> dict[str, Any]:
    """What every row repeats about the machine: hardware, driver, versions."""
    machine: dict[str, Any] = {"python": platform.python_version(), "host": platform.machine()}
    if with_libraries:
        import torch

        machine["torch"] = torch.__version__
        for name in ("triton", "transformers"):
            try:
                machine[name] = __import__(name).__version__
            except ImportError:
                machine[name] = None
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            machine["hardware"] = properties.name
            machine["sm_count"] = properties.multi_processor_count
            machine["l2_mib"] = properties.L2_cache_size / 2**20
            machine["cuda"] = torch.version.cuda
            machine["cudnn"] = torch.backends.cudnn.version()
    if device == "cuda":
        machine["driver"] = _output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    machine.setdefault("hardware", platform.processor() or platform.machine())
    return machine


class Recorder:
    """Appends rows to `folder`/`name` and knows the ceilings measured so far.

    Args:
        folder: Where the record lies; made if missing. Rows already there are read for the
            ceilings of the same hardware, so that processes run one after another share them.
        machine: `describe_machine`'s answer, repeated in each row.
        commit: Commit of the measured sources.
        name: File of the record.
        process: Name of the process that measures; rows of one are interleaved, those of two are
            not. Repeated in each row unless empty.
    """

    def __init__(
        self,
        folder: Path,
        machine: dict[str, Any],
        commit: str | None = None,
        name: str = RECORD_NAME,
        process: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.machine = machine
        self.commit = commit or commit_of_checkout()
        self.process = process
        self.ceilings: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        for row in read_rows(self.path):
            is_same = row.get("machine", {}).get("hardware") == machine.get("hardware")
            if row.get("ceiling") and is_same:
                self.ceilings[row["ceiling"]] = max(
                    row.get("tflops") or row.get("gbps") or 0.0,
                    self.ceilings.get(row["ceiling"], 0.0),
                )

    def add(
        self,
        section: str,
        case: str,
        *,
        timing: Timing | None = None,
        flops: float | None = None,
        bytes_moved: float | None = None,
        ceiling_of: str | None = None,
        ceiling: str | None = None,
        error: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Write one row.

        Args:
            section: Letter and name of the section, "B gemm".
            case: What is measured, "ffn_up".
            timing: Samples; None for a failed case or a remark.
            flops: Floating-point operations of one call (2 per multiply-add).
            bytes_moved: Bytes read plus bytes written by one call, at the least.
            ceiling_of: Ceiling that `flops` are held against ("bf16", "fp8", ...).
            ceiling: Name of the ceiling this row itself measures ("copy", "bf16", ...).
            error: Why there is no timing.
            fields: Further fields: peer, dtype, shape, subnet, notes, rel_err, ...

        Returns:
            The row as written.
        """
        row: dict[str, Any] = {"section": section, "case": case, **fields}
        if error is not None:
            row["error"] = error[:600]
        elif timing is not None:
            row.update(timing_row(timing))
            seconds = row["median_ms"] / 1e3
            if flops:
                row["flops"] = flops
                row["tflops"] = flops / seconds / 1e12
            if bytes_moved:
                row["bytes"] = bytes_moved
                row["gbps"] = bytes_moved / seconds / 1e9
        if ceiling is not None and error is None:
            row["ceiling"] = ceiling
            rate = row.get("tflops") or row.get("gbps")
            if rate:
                self.ceilings[ceiling] = max(rate, self.ceilings.get(ceiling, 0.0))
        if ceiling_of in self.ceilings and "tflops" in row:
            row["share_of_ceiling"] = row["tflops"] / self.ceilings[ceiling_of]
            row["ceiling_of"] = ceiling_of
        if "copy" in self.ceilings and "gbps" in row:
            row["share_of_bandwidth"] = row["gbps"] / self.ceilings["copy"]
        if self.process:
            row["process"] = self.process
        row["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        row["commit"] = self.commit
        row["machine"] = self.machine
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        return row

    @contextmanager
    def guarded(self, section: str, case: str, **fields: Any) -> Iterator[None]:
        """Turn an exception of one case into a row with `error`; the next case still runs."""
        try:
            yield
        except Exception as error:  # a benchmark records any failure and goes on
            self.add(section, case, error=f"{type(error).__name__}: {error}", **fields)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a record file; a last line cut off by a killed process is skipped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def format_table(
    rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]]
) -> str:
    """Plain text table: one line per row, columns padded to their widest cell."""
    cells = [list(columns)] + [[cell(row) for cell in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def write_machine_file(folder: Path) -> None:
    """Save lscpu and nvidia-smi's full reports to `folder`/machine.json; settings untouched."""
    cpu = _output_of("lscpu")
    flags = next((line for line in cpu.splitlines() if line.startswith("Flags")), "")
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    report = {
        "isa": [name for name in known if name in flags.split()],
        "lscpu": cpu,
        "nvidia_smi": _output_of("nvidia-smi"),
        "nvidia_smi_clocks": _output_of("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"),
        "topology": _output_of("nvidia-smi", "topo", "-m"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
