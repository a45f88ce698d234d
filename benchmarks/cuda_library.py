"""The CUDA C++ kernels as a shared library: built by nvcc, called through ctypes.

No backend uses these kernels yet; benchmarks and checks reach them this way. Imports nothing but
the standard library, so that a build can run while torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC")
# The encoder's tensors of a layer, in the order of EncoderLayer (csrc/encoder/encoder_cuda.h).
ENCODER_TENSORS = (
    *(
        ("attention", f"{name}_{kind}")
        for name in ("qkv", "out", "norm")
        for kind in ("weight", "bias")
    ),
    *(("ffn", f"{name}_{kind}") for name in ("up", "down", "norm") for kind in ("weight", "bias")),
)

_POINTER: Any = ctypes.c_void_p
_INT32: Any = ctypes.c_int32
_INT64: Any = ctypes.c_int64
_ENCODER_SHAPE = [_INT32] * 7
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dynabert_gemm_rows": (
        ctypes.c_int,
        [_POINTER] * 4 + [_INT64] * 2 + [_INT32] * 4 + [_POINTER] + [_INT32] * 2 + [_POINTER],
    ),
    "dynabert_gemm_columns": (
        ctypes.c_int,
        [_POINTER] * 8 + [_INT64] * 3 + [_INT32] * 4 + [_POINTER, _INT32, ctypes.c_float, _POINTER],
    ),
    "dynabert_gemm_norm_workspace_bytes": (ctypes.c_int, [_POINTER]),
    "dynabert_encoder_why_not": (ctypes.c_char_p, _ENCODER_SHAPE),
    "dynabert_encoder_workspace_bytes": (ctypes.c_size_t, _ENCODER_SHAPE),
    "dynabert_encoder_forward": (
        ctypes.c_int,
        _ENCODER_SHAPE + [_POINTER] * 8 + [ctypes.c_float] + [_POINTER] * 2,
    ),
}


def find_nvcc() -> str:
    """Path of nvcc.

    Raises:
        FileNotFoundError: There is none on PATH or in the CUDA toolkit's folder.
    """
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")
    if found is None:
        raise FileNotFoundError(
            f"cuda_library: nvcc not found on PATH or in {toolkit}/bin. Install the CUDA toolkit, "
            "12.8 or newer, or set CUDA_HOME."
        )
    return found


def nvcc_release(nvcc: str) -> str:
    """ "13.0", or "unknown"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def compute_capability() -> str | None:
    """ "9.0" of the first card that nvidia-smi lists, or None."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def kernel_sources() -> list[Path]:
    """The files that hold kernels and their launchers."""
    return sorted(path for path in CSRC.rglob("*.cu") if "tests" not in path.parts)


def build(folder: Path) -> Path:
    """Compiles kernels and C names into one shared library, a file per thread.

    Raises:
        FileNotFoundError: nvcc is missing.
        RuntimeError: A file does not compile, or the linker fails; the message is nvcc's.
    """
    nvcc = find_nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    sources = kernel_sources() + sorted((CSRC / "cuda" / "tests").glob("*_c_api.cu"))
    objects = [folder / f"{path.stem}.o" for path in sources]
    commands = [
        [nvcc, *FLAGS, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(_run, commands))
    library = folder / "libdynabert_cuda.so"
    _run([nvcc, *FLAGS, "-shared", "-o", str(library), *map(str, objects)])
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cuda_library: {' '.join(command)}\n{done.stdout}{done.stderr}")


class CudaLibrary:
    """The launchers on tensors. They allocate nothing and run on the current stream.

    Args:
        path: What `build` returned.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def gemm_rows(
        self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, width: int, gelu: bool
    ) -> Tensor:
        """``activation(x @ weight[:width].T + bias[:width])`` into the first columns of `out`.

        Args:
            x: Tokens, ``[T, C]``, bfloat16 like all that follows.
            weight: All rows, ``[full_width, C]``.
            bias: ``[full_width]``.
            out: ``[T, width]`` or wider.
            width: Rows in use, a multiple of 64.
            gelu: Whether GELU follows the bias.
        """
        self._call(
            "dynabert_gemm_rows",
            *map(_address, (x, weight, bias, out)),
            x.stride(0),
            out.stride(0),
            x.shape[0],
            x.shape[1],
            weight.shape[0],
            width,
            None,
            1,
            int(gelu),
            _stream(),
        )
        return out

    def gemm_columns(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        out: Tensor,
        *,
        norm: tuple[Tensor, Tensor] | None = None,
        workspace: Tensor | None = None,
        eps: float = 1e-12,
    ) -> Tensor:
        """``x @ weight[:width] + bias + residual``, and LayerNorm of it, into `out`.

        Args:
            x: ``[T, width]``, width a multiple of 64.
            weight: All rows, ``[full_width, C]``.
            bias: ``[C]``.
            residual: ``[T, C]``.
            out: ``[T, C]``.
            norm: Weight and bias of the LayerNorm, ``[C]`` each; C must be 768.
            workspace: `norm_workspace_bytes` zeros, needed with `norm`; left as they were.
            eps: Of the LayerNorm.
        """
        weight_and_bias = norm or (None, None)
        self._call(
            "dynabert_gemm_columns",
            *map(_address, (x, weight, bias, residual, *weight_and_bias, workspace, out)),
            x.stride(0),
            residual.stride(0),
            out.stride(0),
            x.shape[0],
            out.shape[1],
            weight.shape[0],
            x.shape[1],
            None,
            1,
            eps,
            _stream(),
        )
        return out

    def norm_workspace_bytes(self) -> int:
        """Bytes of the workspace of `gemm_columns` on this device."""
        size = ctypes.c_size_t()
        self._call("dynabert_gemm_norm_workspace_bytes", ctypes.byref(size))
        return size.value

    def encoder_why_not(self, shape: EncoderShape) -> str | None:
        """Why this device cannot run the shape, or None."""
        reason = self._library.dynabert_encoder_why_not(*shape.numbers())
        return None if reason is None else str(reason.decode())

    def encoder_workspace_bytes(self, shape: EncoderShape) -> int:
        """Bytes of workspace; to be zeroed once."""
        return int(self._library.dynabert_encoder_workspace_bytes(*shape.numbers()))

    def encoder_forward(
        self,
        shape: EncoderShape,
        hidden: Tensor,
        out: Tensor,
        offsets: Tensor,
        layers: Tensor,
        subnet: tuple[Tensor, Tensor, Tensor, Tensor],
        workspace: Tensor,
        eps: float = 1e-12,
    ) -> Tensor:
        """All kept layers in one launch.

        Args:
            shape: What the launch is planned for.
            hidden: ``[T, C]``, bfloat16.
            out: ``[T, C]``.
            offsets: Where sequences begin and the last ends, int32.
            layers: Addresses of each layer's `ENCODER_TENSORS`, int64 ``[L, 12]``, on the device.
            subnet: Number of kept layers ``[1]``, their indices, heads and neurons ``[L]``; int32,
                on the device, read when the kernel runs.
            workspace: `encoder_workspace_bytes`.
            eps: Of every LayerNorm.
        """
        self._call(
            "dynabert_encoder_forward",
            *shape.numbers(),
            *map(_address, (hidden, out, offsets, layers, *subnet)),
            eps,
            _address(workspace),
            _stream(),
        )
        return out

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: CUDA error {code}")


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of `EncoderShape` in csrc/encoder/encoder_cuda.h, in its order."""

    tokens: int
    sequences: int
    layers: int
    hidden_size: int
    head_dim: int
    max_heads: int
    max_intermediate: int

    def numbers(self) -> tuple[int, ...]:
        """As the launchers take them."""
        return tuple(vars(self).values())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream() -> int:
    import torch

    return torch.cuda.current_stream().cuda_stream
