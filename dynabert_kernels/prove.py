"""``python -m dynabert_kernels.prove``: compare every path with the reference on this card.

Paths are compared on many shapes, in processes side by side because compiling takes most of the
time. Those that agree within the tests' tolerance are written as proofs (`proof`).
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import torch

from dynabert_kernels import _cuda_extension, proof
from dynabert_kernels.proof import Path, Proof
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops._trust import Kernels

_MOST_PROCESSES = 16


def difference(path: Path, device: torch.device) -> str | None:
    """How a path differs from the reference on a device, on many shapes, or None."""
    from dynabert_kernels.ops import _self_check, attention, ffn

    if path.op == "embeddings":
        return _self_check.embeddings_difference(path, device)
    if path.op == "encoder":
        return _self_check.encoder_difference(path, device)
    kernels: dict[tuple[str, str], Kernels] = {
        (proof.CUDA, "attention"): attention._cuda.KERNELS,
        (proof.CUDA, "ffn"): ffn._cuda.KERNELS,
        (proof.TRITON, "attention"): attention._triton.KERNELS,
        (proof.TRITON, "ffn"): ffn._triton.KERNELS,
    }
    problems = _self_check.THOROUGH[path.backend][path.op]
    return _self_check.difference(kernels[path.backend, path.op], path, device, problems)


def missing(backend: str) -> str | None:
    """Why a backend cannot be proven in this process, or None."""
    if backend == proof.CUDA:
        return _cuda_extension.OPT_IN or _cuda_extension.cuda_error()
    return availability.OPT_IN or availability.triton_missing()


def prove(paths: Sequence[Path], device: torch.device, *, processes: int) -> dict[Path, str | None]:
    """Each path with None, or how it differs."""
    if processes == 1:
        return {path: difference(path, device) for path in paths}
    # Those with the most to compile first, so that none of them is left alone at the end.
    order = sorted(paths, key=lambda path: path.direction != proof.BACKWARD)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(
        min(processes, len(paths)), context, torch.set_num_threads, (1,)
    ) as pool:
        found = dict(zip(order, pool.map(partial(difference, device=device), order), strict=True))
    return {path: found[path] for path in paths}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table and writes the proofs; returns 1 where a path differs, 2 without a card."""
    parser = argparse.ArgumentParser(prog="python -m dynabert_kernels.prove", description=__doc__)
    parser.add_argument(
        "--out", type=FilePath, default=proof.PROVEN, help="file of proofs to add to"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(_MOST_PROCESSES, os.cpu_count() or 1),
        help="how many compile and compare side by side",
    )
    options = parser.parse_args(arguments)
    reasons = {backend: missing(backend) for backend in proof.BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"prove: {backend} is left out: {reason}", file=sys.stderr)
    backends = [backend for backend, reason in reasons.items() if reason is None]
    if not backends or not torch.cuda.is_available():
        print("prove: nothing to prove, expected a CUDA device. Run it on a card.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    capability = proof.capability(device)
    assert capability is not None
    start = time.monotonic()
    paths = [path for backend in backends for path in proof.all_paths(backend, capability)]
    found = prove(paths, device, processes=max(1, options.processes))
    proofs = record(found, torch.cuda.get_device_name(device))
    proof.write(options.out, proofs, tried=paths)
    print(table(found))
    seconds = time.monotonic() - start
    print(f"{len(proofs)} of {len(paths)} paths proven in {seconds:.1f} s: {options.out}")
    return 0 if len(proofs) == len(paths) else 1


def record(found: dict[Path, str | None], card: str) -> list[Proof]:
    """The proofs of the paths that agreed, with the installed software and today's date."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = {backend: proof.kernels_version(backend) or "unknown" for backend in proof.BACKENDS}
    return [
        Proof(path, card, str(torch.__version__), versions[path.backend], today)
        for path, error in found.items()
        if error is None
    ]


def table(found: dict[Path, str | None]) -> str:
    """A line for each backend, op, direction and dtype, and one for each path that differs."""
    sizes: dict[tuple[str, str, str, str], list[str]] = {}
    for path, error in found.items():
        row = sizes.setdefault((path.backend, path.op, path.direction, path.dtype), [])
        if error is None:
            row.append("agrees" if path.head_dim is None else str(path.head_dim))
    lines = [
        f"{backend:<8}{op:<11}{direction:<10}{dtype:<10}{' '.join(agreed) or '-'}"
        for (backend, op, direction, dtype), agreed in sizes.items()
    ]
    lines.insert(0, f"{'backend':<8}{'op':<11}{'direction':<10}{'dtype':<10}agrees (head_dim)")
    lines += [
        f"{path.backend}: {path}: {error}" for path, error in found.items() if error is not None
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
