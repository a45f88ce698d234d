"""Checks the parts of the CUDA C++ kernels and times them on a Hopper card: half a minute.

    python -m benchmarks.gpu_cuda [--out FILE.jsonl] [--budget-s 40]

Products on prefixes of the weights stand beside cuBLAS and PyTorch's calls, the encoder in one
launch beside eager layers in a CUDA graph; each is held against float32 first and timed as
`gpu_timing` says. Rows are appended to FILE, tables are printed. Whole models are timed by
`bench_gpu`. The kernels must have been built: by the installation, or into the source tree by
`python csrc/cuda/build_cuda.py --out dynabert_kernels --architectures 90a`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cuda_cases
from benchmarks.cuda_library import CudaLibrary
from benchmarks.geometry import BASE
from benchmarks.gpu_timing import heat_up
from benchmarks.records import Deadline, Recorder, describe_machine
from dynabert_kernels import _cuda_extension


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything there is; returns the rows.

    Raises:
        ImportError: The kernels were not built.
        RuntimeError: There is no Hopper card.
    """
    deadline = Deadline(options.budget_s)
    library = CudaLibrary()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device. Run it on an H100, H200 or GH200")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise RuntimeError(
            f"compute capability {capability[0]}.{capability[1]}, expected 9.0. Run it on an H100, "
            "H200 or GH200"
        )
    torch.manual_seed(0)
    encoder = gpu_cuda_cases.Encoder(BASE, "cuda")
    info = _cuda_extension.build_info()
    assert info is not None
    machine = describe_machine("cuda") | {"nvcc": info["nvcc"], "kernels": info["sources"]}
    recorder = Recorder(options.out.parent, machine, options.commit, name=options.out.name)
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
    parser.add_argument("--budget-s", type=float, default=40.0)
    parser.add_argument("--commit", default=None, help="recorded where the tree has no git")
    options = parser.parse_args(arguments)
    try:
        rows = measure_all(options)
    except (ImportError, RuntimeError) as error:
        sys.exit(f"gpu_cuda: {error}")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
