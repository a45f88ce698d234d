"""What runs on this machine and why the rest does not: the report of `dynabert doctor`.

`python -m dynabert_kernels` prints the same without the model package.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections import Counter
from typing import Any

import torch

from dynabert_kernels import _cuda_extension, _extension, proof
from dynabert_kernels.ops import OPS, Op, _trust, forced_backend
from dynabert_kernels.triton import availability

_PACKAGES = ("dynabert-kernels", "torch", "transformers", "triton")


def doctor_report() -> dict[str, Any]:
    """Collects versions, CPU, GPU, extension, and every op's backends with the reason against each.

    Never raises for what it finds: a broken part of the installation is a sentence in the report.

    Returns:
        Plain JSON values. ``ops[op][backend]`` is None if calls run on the backend here without
        being told to, else the reason why not; ``extension["reason"]`` and ``gpu["reason"]`` are
        None where there is one to use. ``cuda["build"]`` says what its kernels were built for, None
        where they were not; ``cuda["proven"]`` and ``triton["proven"]`` list the recorded proofs,
        and ``["cards"]`` how each path stands on each card here: ``"proven"``, ``"checked in this
        process"``, None where its first call checks it, or how it differs.
    """
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "cpu": _cpu(),
        "extension": _compiled(),
        "gpu": _gpu(),
        "forced_backend": forced_backend(),
        "ops": {name: _backends(op) for name, op in OPS.items()},
        "cuda": {
            "reason": _cuda_extension.cuda_error(),
            "build": _cuda_extension.build_info(),
            **_standing(proof.CUDA, _cuda_extension.OPT_IN or _cuda_extension.cuda_error()),
        },
        "triton": {
            "compilations": availability.triton_compilations(),
            **_standing(proof.TRITON, availability.triton_missing()),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _compiled() -> dict[str, Any]:
    reason = _extension.extension_error()
    if reason is not None:
        return {"reason": reason}
    module = _extension.cpu_extension()
    return {
        "reason": None,
        "isa": module.isa_name(),
        "supported_isas": module.supported_isas(),
        "parallel_for_threads": module.parallel_for_threads(),
        **module.build_info(),
    }


def _gpu() -> dict[str, Any]:
    reason = None
    if torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    devices = []
    for index in range(torch.cuda.device_count() if reason is None else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"reason": reason, "devices": devices, "nvcc": shutil.which("nvcc")}


def _standing(backend: str, missing: str | None) -> dict[str, Any]:
    """The recorded proofs of a backend, and how its paths stand on the cards here."""
    cards: dict[str, dict[str, str | None]] = {}
    if missing is None and _gpu()["reason"] is None:
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            capability = proof.capability(device)
            if capability is not None and torch.cuda.get_device_capability(device) >= (8, 0):
                paths = proof.all_paths(backend, capability)
                cards[capability] = {str(path): _trust.known(path) for path in paths}
    proven = [proof.as_entry(found) for found in proof.proofs() if found.path.backend == backend]
    return {"proven": proven, "cards": cards}


def _backends(op: Op[Any]) -> dict[str, str | None]:
    table: dict[str, str | None] = {}
    for backend in op.backends:
        table[backend.name] = dict(op.status(backend.device))[backend.name]
        if table[backend.name] is None and backend.device == "cuda":
            table[backend.name] = _gpu()["reason"]
        if table[backend.name] is None and forced_backend() != backend.name:
            table[backend.name] = backend.unproven
    return table | {"reference": None}


def format_report(report: dict[str, Any]) -> str:
    """Lays a report out as text for a terminal, ending without a line break.

    Args:
        report: What `doctor_report` returned.
    """
    versions = [
        f"{name} {version or 'not installed'}" for name, version in report["versions"].items()
    ]
    lines = ["versions   " + ", ".join(versions)]
    cpu = report["cpu"]
    lines.append(
        f"cpu        {cpu['machine']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"
    )
    lines += [f"extension  {line}" for line in _extension_lines(report["extension"])]
    gpu = report["gpu"]
    found = [f"{d['name']}, {d['capability']}, {d['memory_gib']} GiB" for d in gpu["devices"]]
    lines += [f"gpu        {line}" for line in found or [f"none: {gpu['reason']}"]]
    lines.append(f"nvcc       {gpu['nvcc'] or 'not on PATH'}")
    forced = report["forced_backend"]
    known = {name for backends in report["ops"].values() for name in backends}
    note = "" if forced is None or forced in known else ": no op has it, every call will be refused"
    lines.append(f"backend    {forced or 'chosen per call'}{note}")
    lines += ["", "op         backend    runs  why not"]
    for op, backends in report["ops"].items():
        for backend, reason in backends.items():
            runs = "yes" if reason is None else "no"
            lines.append(f"{op:<11}{backend:<11}{runs:<6}{reason or ''}".rstrip())
    lines += ["", *(f"cuda       {line}" for line in _cuda_lines(report["cuda"]))]
    lines += [f"triton     {line}" for line in _standing_lines(report["triton"])]
    return "\n".join(lines)


def _cuda_lines(cuda: dict[str, Any]) -> list[str]:
    build = cuda["build"]
    if build is None:
        return []  # the table has the reason
    if build["emulated"]:
        return [f"emulated on the CPU, sources {build['sources']}"]
    architectures = ", ".join(f"sm_{number}" for number in build["architectures"])
    ptx = f", PTX of compute_{build['ptx']}" if build["ptx"] else ""
    built = f"built with nvcc {build['nvcc']} for {architectures}{ptx}, sources {build['sources']}"
    return [built, *_standing_lines(cuda)]


def _standing_lines(backend: dict[str, Any]) -> list[str]:
    where = "{card} ({capability}), kernels {kernels}, torch {torch}, {date}"
    proven = Counter(where.format(**entry) for entry in backend["proven"])
    found = [f"{count} paths proven on {card}" for card, count in proven.items()]
    for capability, paths in backend["cards"].items():
        waiting = [path for path, standing in paths.items() if standing is None]
        good = len(paths) - len(waiting) - len(_differing(paths))
        found.append(f"on {capability} here: {good} of {len(paths)} paths proven or checked")
        if waiting:
            kinds = Counter(path.partition(" in ")[0] for path in waiting)
            listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            found.append(f"check themselves at their first call: {listed}")
        found += [f"not used: {standing}" for standing in _differing(paths)]
    return found or ["no path is proven on any card yet"]


def _differing(paths: dict[str, str | None]) -> list[str]:
    return [s for s in paths.values() if s is not None and s not in _trust.GOOD]


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    if extension["reason"] is not None:
        return [extension["reason"]]
    threads = extension["parallel_for_threads"]
    openmp = "without OpenMP, loops are serial"
    if extension["openmp"] != "off":
        openmp = f"OpenMP {extension['openmp']}, parallel loops on {threads} threads"
    return [
        f"built with {extension['compiler']} ({extension['flags']}) for torch {extension['torch']}",
        openmp,
        f"ISA {extension['isa']} of {', '.join(extension['supported_isas'])}",
    ]
