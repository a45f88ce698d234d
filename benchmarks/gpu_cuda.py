"""Builds the CUDA C++ kernels, checks them and times them on a Hopper card: half a minute.

    python -m benchmarks.gpu_cuda [--out FILE.jsonl] [--work-dir DIR] [--budget-s 35]

No backend uses these kernels yet. Products on prefixes of the weights stand beside cuBLAS and
PyTorch's calls, the encoder in one launch beside eager layers in a CUDA graph; each is held against
float32 first and timed as `gpu_timing` says. Rows are appended to FILE, tables are printed.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.cuda_library import (
    CudaLibrary,
    build,
    compute_capability,
    find_nvcc,
    nvcc_release,
)
from benchmarks.records import Deadline, Recorder, describe_machine


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build while torch is imported and the weights are drawn, then measure; returns the rows."""
    deadline = Deadline(options.budget_s)
    nvcc, capability = find_nvcc(), compute_capability()
    if capability != "9.0":
        raise RuntimeError(
            f"compute capability {capability or 'unknown: no GPU answers'}, expected 9.0. Run it "
            "on an H100, H200 or GH200"
        )
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build, options.work_dir)
        import torch

        from benchmarks import gpu_cuda_cases
        from benchmarks.geometry import BASE
        from benchmarks.gpu_timing import heat_up

        torch.manual_seed(0)
        encoder = gpu_cuda_cases.Encoder(BASE, "cuda")
        library = CudaLibrary(building.result())
    machine = describe_machine("cuda") | {"nvcc": nvcc_release(nvcc)}
    recorder = Recorder(options.out.parent, machine, options.commit, name=options.out.name)
    print(f"built and loaded after {deadline.spent_s():.1f} s", flush=True)
    heat_up("cuda")
    gpu_cuda_cases.run(recorder, library, encoder, deadline)
    print(gpu_cuda_cases.tables(recorder.rows))
    print(f"{deadline.spent_s():.1f} s")
    return recorder.rows


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results" / "gpu_cuda.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--work-dir", type=Path, default=Path("build/bench-cuda"))
    parser.add_argument("--budget-s", type=float, default=35.0)
    parser.add_argument("--commit", default=None, help="recorded where the tree has no git")
    options = parser.parse_args(arguments)
    try:
        rows = measure_all(options)
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f"gpu_cuda: {error}")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
