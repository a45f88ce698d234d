"""The launchers of the CUDA C++ kernels on tensors, for benchmarks: one product or core at a time.

Backend `cuda` runs whole sublayers; what these are made of is called here past it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dynabert_kernels import _cuda_extension

_GELU, _BF16 = 1, 1  # of csrc/cuda/types.h
# The encoder's tensors of a layer, in the order of EncoderLayer (csrc/encoder/encoder_cuda.h).
ENCODER_TENSORS = (
    *(
        ("attention", f"{name}_{kind}")
        for name in ("qkv", "out", "norm")
        for kind in ("weight", "bias")
    ),
    *(("ffn", f"{name}_{kind}") for name in ("up", "down", "norm") for kind in ("weight", "bias")),
)


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


class CudaLibrary:
    """Launches on the current stream; nothing is allocated.

    Args:
        module: `dynabert_kernels._C_cuda`; None loads it.

    Raises:
        ImportError: It was not built; the message says why.
    """

    def __init__(self, module: ModuleType | None = None) -> None:
        self._module = _cuda_extension.cuda_extension() if module is None else module

    def gemm_rows(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        out: Tensor,
        *,
        width: int,
        gelu: bool,
        hopper: bool = True,
    ) -> Tensor:
        """``activation(x @ weight[:width].T + bias[:width])`` into the first columns of `out`.

        Args:
            x: Tokens, ``[T, C]``, bfloat16 like all that follows.
            weight: All rows, ``[full_width, C]``.
            bias: ``[full_width]``.
            out: ``[T, width]`` or wider.
            width: Rows in use.
            gelu: Whether GELU follows the bias.
            hopper: Whether the kernels for Hopper run, or those for every card from sm_80.
        """
        self._module.gemm_rows(
            hopper,
            *_place(x),
            _BF16,
            _GELU if gelu else 0,
            *map(_address, (x, weight, bias, out)),
            x.stride(0),
            out.stride(0),
            *x.shape,
            weight.shape[0],
            width,
            0,
            1,
        )
        return out

    def gemm_columns(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        out: Tensor,
        *,
        residual: Tensor | None = None,
        norm: tuple[Tensor, Tensor] | None = None,
        workspace: Tensor | None = None,
        eps: float = 1e-12,
        hopper: bool = True,
    ) -> Tensor:
        """``x @ weight[:width] + bias``, with `residual` and LayerNorm if given, into `out`.

        Args:
            x: ``[T, width]``.
            weight: All rows, ``[full_width, C]``.
            bias: ``[C]``.
            out: ``[T, C]``.
            residual: ``[T, C]``; only on Hopper.
            norm: Weight and bias of the LayerNorm, ``[C]`` each; C must be 768. Only on Hopper.
            workspace: `norm_workspace_bytes` zeros, needed with `norm`; left as they were.
            eps: Of the LayerNorm.
            hopper: Whether the kernels for Hopper run, or those for every card from sm_80.
        """
        norm_weight, norm_bias = norm or (None, None)
        self._module.gemm_columns(
            hopper,
            *_place(x),
            _BF16,
            *map(_address, (x, weight, bias, residual, norm_weight, norm_bias, workspace)),
            eps,
            _address(out),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            x.shape[0],
            out.shape[1],
            weight.shape[0],
            x.shape[1],
            0,
            1,
        )
        return out

    def norm_workspace_bytes(self, device: int = 0) -> int:
        """Bytes of the workspace of `gemm_columns`."""
        return int(self._module.norm_workspace_bytes(device))

    def encoder_why_not(self, shape: EncoderShape, device: int = 0) -> str | None:
        """Why this device cannot run the shape, or None."""
        reason: str | None = self._module.encoder_why_not(device, *shape.numbers())
        return reason

    def encoder_workspace_bytes(self, shape: EncoderShape, device: int = 0) -> int:
        """Bytes of workspace; to be zeroed once."""
        return int(self._module.encoder_workspace_bytes(device, *shape.numbers()))

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
        self._module.encoder(
            *_place(hidden),
            *shape.numbers(),
            *map(_address, (hidden, out, offsets, layers, *subnet)),
            False,
            eps,
            _address(workspace),
        )
        return out


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.get_device(), torch.cuda.current_stream().cuda_stream


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
