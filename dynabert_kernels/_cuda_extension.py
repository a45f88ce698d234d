"""Loads the CUDA C++ kernels, `dynabert_kernels._C_cuda`, or says in a sentence why not.

The module takes addresses and numbers and knows no torch. `DYNABERT_CUDA_EMULATION` names a build
of the same sources that runs them on the CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dynabert_kernels import _env

_PACKAGE = Path(__file__).resolve().parent
_NAME = "dynabert_kernels._C_cuda"
_EMULATED_NAME = "_C_cuda_emulated"

HEAD_DIMS = (32, 64, 80, 128)
ENCODER_HEAD_DIMS = (32, 64)
ENCODER_CAPABILITY = "sm_90"
"""What the persistent encoder is made for; always bfloat16."""
DTYPES = (torch.bfloat16, torch.float16)
"""Of the products; accumulated in float32."""

EMULATED = _env.cuda_emulation() is not None
DEVICE = "cpu" if EMULATED else "cuda"
OPT_IN = (
    "the emulation of CUDA kernels is for tests; choose it with use_backend('cuda')"
    if EMULATED
    else None
)
"""Why only `use_backend` may choose the kernels, or None."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Loads the module once: the module and no reason, or no module and the reason."""
    emulation = _env.cuda_emulation()
    try:
        if emulation is not None:
            return load_emulated(Path(emulation)), None
        if importlib.util.find_spec(_NAME) is None:
            return None, f"CUDA kernels not built: {_recorded_reason()}"
        return importlib.import_module(_NAME), None
    except ImportError as error:
        return None, f"CUDA kernels not loadable: {error}. Build them again"


def load_emulated(path: Path) -> ModuleType:
    """The emulated module in a file that `csrc/cuda/build_cuda.py --emulated` built.

    Raises:
        ImportError: It is not there, or is no such module.
    """
    # pybind11 keeps modules by their whole name, and copies of a file are modules of their own.
    spec = importlib.util.spec_from_file_location(f"{path.parent}.{_EMULATED_NAME}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recorded_reason() -> str:
    """What setup.py recorded about the build."""
    try:
        record = json.loads((_PACKAGE / "_build_record.json").read_text())
    except (OSError, ValueError):
        record = {}
    reason = record.get("cuda_reason") if isinstance(record, dict) else None
    return str(reason or "no build has run. Install the package with pip, where nvcc is")


def cuda_error() -> str | None:
    """None if the module can be used, else why it cannot, as one sentence."""
    module, reason = _load()
    if module is None:
        return reason
    if not hasattr(module, "versions"):
        return "the CUDA kernels were built from older sources. Build them again"
    return _driver_error(*module.versions())


def _driver_error(driver: int, runtime: int) -> str | None:
    """Why a driver cannot run what a runtime loads, or None; versions such as 13000, 0 for none.

    A driver runs what later toolkits of its own major version have built.
    """
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the driver is for CUDA {driver // 1000}, and the kernels were built with CUDA "
        f"{runtime // 1000}. Update the driver, or build them with an older toolkit"
    )


def cuda_extension() -> ModuleType:
    """The loaded module.

    Raises:
        ImportError: It was not built or cannot be loaded; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


def build_info() -> dict[str, Any] | None:
    """What was built, from which sources and by what; None where there is no module.

    Returns:
        ``architectures`` (such as ``["80", "90a"]``), ``ptx`` (the one whose PTX is kept), ``nvcc``
        (its release), ``sources`` (a hash of them) and ``emulated``.
    """
    module = _load()[0]
    if module is None:
        return None
    info: dict[str, Any] = module.build_info()
    return info | {"architectures": list(filter(None, info["architectures"].split(",")))}


def kernels_version() -> str | None:
    """What decides on the machine code: the sources and the compiler; None without a module."""
    info = build_info()
    return None if info is None else f"{info['sources']} nvcc {info['nvcc']}"


def covered_capabilities(info: dict[str, Any]) -> frozenset[tuple[int, int]]:
    """Compute capabilities of the cards that a build has code for.

    Args:
        info: What `build_info` returned.
    """
    found: set[tuple[int, int]] = set()
    for architecture in info["architectures"]:
        major, minor = divmod(int(architecture.rstrip("af")), 10)
        # Code runs on later cards of its generation, what is for one card on that alone.
        last = minor if architecture.endswith("a") else 9
        found.update((major, number) for number in range(minor, last + 1))
    if info["ptx"]:
        oldest = divmod(int(info["ptx"]), 10)
        numbers = [(major, minor) for major in range(oldest[0], 100) for minor in range(10)]
        found.update(number for number in numbers if number >= oldest)
    return frozenset(found)
