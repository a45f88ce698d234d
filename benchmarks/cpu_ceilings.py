"""The CPU's own limits at a number of threads: fp32, bf16, int8 operations, and reading memory.

    python -m benchmarks.cpu_ceilings --threads 2

One JSON line per limit: its ``kind``, and its ``rate`` in units per second or an ``error``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.peers import CHECKOUT, worker_environment

KINDS = ("fp32", "bf16", "int8", "memory")
# Which arithmetic a dtype is held against.
KIND_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}


def measure_here(kind: str, threads: int, seconds: float) -> dict[str, Any]:
    """One limit, measured by the extension in this process; the reason where it cannot."""
    from dynabert_kernels._extension import cpu_extension

    try:
        extension = cpu_extension()
        if not hasattr(extension, "measure_peak"):
            raise ImportError("the extension has no measure_peak. Rebuild it")
        return {"kind": kind, "rate": float(extension.measure_peak(kind, threads, seconds))}
    except (ImportError, ValueError) as error:
        return {"kind": kind, "error": str(error).splitlines()[0]}


def measure_alone(threads: int, seconds: float) -> list[dict[str, Any]]:
    """Every limit, measured by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_ceilings"]
    done = subprocess.run(
        [*command, "--threads", str(threads), "--seconds", str(seconds)],
        capture_output=True,
        text=True,
        env=worker_environment(threads),
        cwd=CHECKOUT,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [{"kind": kind, "error": last} for kind in KINDS]
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each limit")
    options = parser.parse_args()
    for kind in KINDS:
        print(json.dumps(measure_here(kind, options.threads, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
