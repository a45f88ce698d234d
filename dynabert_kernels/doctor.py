"""What runs on this machine and why the rest does not: the report of `dynabert doctor`.

`python -m dynabert_kernels` prints the same without the model package.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

from dynabert_kernels import _extension
from dynabert_kernels.ops import OPS, Op, forced_backend

_PACKAGES = ("dynabert-kernels", "torch", "transformers", "triton")

# Backends of the design that an op may not have yet, in the order in which they would be chosen.
_NOT_RELEASED = {
    "cuda": "CUDA kernels are not part of this release",
}


def doctor_report() -> dict[str, Any]:
    """Collects versions, CPU, GPU, extension, and every op's backends with the reason against each.

    Never raises for what it finds: a broken part of the installation is a sentence in the report.

    Returns:
        Plain JSON values. ``ops[op][backend]`` is None if calls run on the backend here without
        being told to, else the reason why not; ``extension["reason"]`` and ``gpu["reason"]`` are
        None where there is one to use.
    """
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "cpu": _cpu(),
        "extension": _compiled(),
        "gpu": _gpu(),
        "forced_backend": forced_backend(),
        "ops": {name: _backends(op) for name, op in OPS.items()},
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


def _backends(op: Op[Any]) -> dict[str, str | None]:
    table: dict[str, str | None] = dict(_NOT_RELEASED)
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
    return "\n".join(lines)


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
