"""``python -m dynabert_kernels.triton.prove``: compare every path with the reference on this card.

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

import torch

from dynabert_kernels.triton import availability, proof
from dynabert_kernels.triton.proof import Path, Proof

_MOST_PROCESSES = 16


def difference(path: Path, device: torch.device) -> str | None:
    """How a path differs from the reference on a device, on many shapes, or None."""
    from dynabert_kernels.ops import _self_check
    from dynabert_kernels.ops.attention import _triton as attention
    from dynabert_kernels.ops.ffn import _triton as ffn

    if path.op == "embeddings":
        return _self_check.embeddings_difference(path, device)
    kernels = {"attention": attention.KERNELS, "ffn": ffn.KERNELS}[path.op]
    return _self_check.difference(kernels, path, device, _self_check.THOROUGH[path.op])


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
    parser = argparse.ArgumentParser(
        prog="python -m dynabert_kernels.triton.prove", description=__doc__
    )
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
    missing = availability.triton_missing()
    if missing is not None or availability.INTERPRETED or not torch.cuda.is_available():
        reason = missing or "torch sees no CUDA device, or TRITON_INTERPRET is set"
        print(f"prove: {reason}, expected a CUDA device. Run it on a card.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    capability = proof.capability(device)
    assert capability is not None
    start = time.monotonic()
    paths = proof.all_paths(capability)
    found = prove(paths, device, processes=max(1, options.processes))
    proofs = record(found, torch.cuda.get_device_name(device))
    proof.write(options.out, proofs, tried=paths)
    print(table(found))
    seconds = time.monotonic() - start
    print(f"{len(proofs)} of {len(paths)} paths proven in {seconds:.1f} s: {options.out}")
    return 0 if len(proofs) == len(paths) else 1


def record(found: dict[Path, str | None], card: str) -> list[Proof]:
    """The proofs of the paths that agreed, with the installed software and today's date."""
    versions = (str(torch.__version__), proof.triton_version() or "unknown")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return [Proof(path, card, *versions, today) for path, error in found.items() if error is None]


def table(found: dict[Path, str | None]) -> str:
    """A line for each op, direction and dtype, and one for each path that differs."""
    sizes: dict[tuple[str, str, str], list[str]] = {}
    for path, error in found.items():
        row = sizes.setdefault((path.op, path.direction, path.dtype), [])
        if error is None:
            row.append("agrees" if path.head_dim is None else str(path.head_dim))
    lines = [
        f"{op:<11}{direction:<10}{dtype:<10}{' '.join(agreed) or '-'}"
        for (op, direction, dtype), agreed in sizes.items()
    ]
    lines.insert(0, f"{'op':<11}{'direction':<10}{'dtype':<10}agrees (head_dim)")
    lines += [f"{path}: {error}" for path, error in found.items() if error is not None]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
