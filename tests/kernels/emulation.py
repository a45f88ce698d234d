"""Backend `cuda` on the CPU: its kernels built as plain C++, in the place of a card's.

The build is kept in the checkout's build folder and made anew only where a source has changed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dynabert_kernels import _cuda_extension, use_backend
from dynabert_kernels.ops import _cuda
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.attention import _cuda as cuda_attention
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.ops.ffn import _cuda as cuda_ffn

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDER = CHECKOUT / "build" / "cuda-emulated"


@cache
def build_script() -> ModuleType:
    """``csrc/cuda/build_cuda.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location(
        "build_cuda", CHECKOUT / "csrc" / "cuda" / "build_cuda.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@cache
def emulated_file() -> Path:
    """The module's file; skips where a compiler, ninja or CUDA's headers are missing."""
    script = build_script()
    try:
        compiler = script.emulating_compiler(cxx=os.environ.get("CXX"))
        script.find_ninja()
        script.find_pybind11()
    except script.BuildError as error:
        pytest.skip(str(error))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built: Path = script.build(FOLDER, compiler)
    return built


@cache
def emulated_module(capability: int, multiprocessors: int) -> ModuleType:
    """The module as a card, of compute capability 80, say; a copy for each keeps its own."""
    built = emulated_file()
    copy = FOLDER / f"sm_{capability}_{multiprocessors}" / built.name
    copy.parent.mkdir(exist_ok=True)
    beside = copy.with_name(f"{copy.name}.{os.getpid()}")
    shutil.copy2(built, beside)
    os.replace(beside, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNABERT_EMULATED_CAPABILITY", str(capability))
        patch.setenv("DYNABERT_EMULATED_MULTIPROCESSORS", str(multiprocessors))
        module = _cuda_extension.load_emulated(copy)
        assert module.compute_capability(0) == capability  # it has read the variables
    return module


_library = torch.library.Library("dynabert", "FRAGMENT")


@cache
def _register() -> None:
    for op, kernels in (("attention", cuda_attention.KERNELS), ("ffn", cuda_ffn.KERNELS)):
        _library.impl(f"{op}.cuda", kernels.run, "CPU")


@contextmanager
def emulated_cuda(capability: int, multiprocessors: int = 4) -> Iterator[None]:
    """Within it `use_backend("cuda")` runs the emulated kernels on CPU tensors, and is in force."""
    module: Any = emulated_module(capability, multiprocessors)
    if not _cuda_extension.EMULATED:
        _register()
    with pytest.MonkeyPatch.context() as patch, use_backend("cuda"):
        patch.setattr(_cuda_extension, "cuda_extension", lambda: module)
        for name, value in (("EMULATED", True), ("DEVICE", "cpu"), ("_MISSING", None)):
            patch.setattr(_cuda, name, value)
        patch.setattr(_cuda, "_zeros", {})
        for op in (ATTENTION, FFN):
            backends = [
                replace(b, device="cpu", unavailable=None, unproven="it is emulated")
                if b.name == "cuda"
                else b
                for b in op.backends
            ]
            patch.setattr(op, "backends", tuple(backends))
        yield
