"""Launchers of the row norm that ends both sublayers, forward and backward; see `norm`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynabert_kernels.triton.dispatch import cdiv, next_power_of_2, start
from dynabert_kernels.triton.launch import Dropout, with_contiguous_rows
from dynabert_kernels.triton.norm import (
    add_partial_vectors_kernel,
    residual_norm_backward_kernel,
    residual_norm_forward_kernel,
)

# Most programs whose shares of the parameters' gradients the second kernel adds.
_BACKWARD_PROGRAMS = 512


class NormForward(NamedTuple):
    """A normalised row and what was normalised.

    Attributes:
        out: ``[T, C]``.
        total: The sum that was normalised, ``[T, C]``, for the backward pass.
    """

    out: Tensor
    total: Tensor


class NormGradients(NamedTuple):
    """What `norm_gradient` returns.

    Attributes:
        total: Gradient of the sum that was normalised, which is also that of the residual,
            ``[T, C]``.
        projected: The same through dropout, ``[T, C]``; `total` itself where nothing changes.
        norm_weight: ``[C]``, float32.
        norm_bias: ``[C]``, float32.
        bias: Gradient of the bias that was added before dropout, ``[C]``, float32.
    """

    total: Tensor
    projected: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    bias: Tensor


def _dropout_arguments(dropout: Dropout | None) -> dict[str, float]:
    if dropout is None:
        return {"dropout_p": 0.0, "dropout_scale": 1.0}
    kept = 1.0 - dropout.p
    return {"dropout_p": dropout.p, "dropout_scale": 1.0 / kept if kept > 0 else 0.0}


def _forward_blocks(tokens: int, parts: int, channels: int) -> tuple[int, int, int]:
    """Rows of a block, blocks of a program, and warps."""
    if parts > 1 or tokens <= 1024 or channels > 1024:
        return 1, 1, 8 if channels > 2048 else 4
    # A warp for each row needs no exchange between warps, and reads the parameters once for four.
    # H200, [16384, 768] bfloat16: 16.6 us; one row a program 17.5, four warps a row 20.9; a copy
    # takes 12.6. At 4096 rows one row a program is the fastest: 5.5 us, with four rows 6.4.
    return 1, 4 if tokens > 8192 else 1, 1


def _backward_blocks(tokens: int, channels: int) -> tuple[int, int, int]:
    """Rows of a block, blocks of a program, and warps: the order of the sums, so by shape alone."""
    # H200, [16384, 768] bfloat16, both kernels: 41.6 us; one row a block 60.5, four 50.0, half as
    # many programs 64.3, twice as many 46.3.
    block_t, num_warps = (1, 8) if channels > 1024 else (2, 4)
    steps = next_power_of_2(cdiv(tokens, _BACKWARD_PROGRAMS * block_t))
    return block_t, max(2, steps), num_warps


def residual_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    dropout: Dropout | None = None,
    num_tokens: Tensor | None = None,
    keep_total: bool = False,
) -> Tensor | NormForward:
    """LayerNorm of a row, ``[T, C]`` in residual's dtype.

    Args:
        x: ``[T, C]`` with bias, dropout and residual done, or float32 partial sums
            ``[parts, T, C]`` without; contiguous.
        bias: ``[C]``, contiguous; likewise `norm_weight` and `norm_bias`.
        residual: ``[T, C]``, rows any distance apart.
        norm_weight: See `bias`.
        norm_bias: See `bias`.
        eps: Added to the variance.
        dropout: Of partial sums with their bias.
        num_tokens: Rows that hold tokens, one int32; the others stay undefined. None: all.
        keep_total: Whether to return what was normalised too, in residual's dtype.
    """
    assert x.is_contiguous()
    tokens, channels = residual.shape
    out = torch.empty(tokens, channels, dtype=residual.dtype, device=residual.device)
    has_parts = x.dim() == 3
    parts = x.shape[0] if has_parts else 1
    total = torch.empty_like(out) if has_parts and keep_total else x
    if tokens > 0:
        block_t, steps, num_warps = _forward_blocks(tokens, parts, channels)
        start(
            residual_norm_forward_kernel,
            (cdiv(tokens, steps * block_t),),
            x,
            bias,
            residual,
            norm_weight,
            norm_bias,
            out,
            total,
            num_tokens,
            None if dropout is None else dropout.seed,
            tokens,
            channels,
            residual.stride(0),
            eps,
            steps=steps,
            **_dropout_arguments(dropout),
            NUM_PARTS=parts,
            HAS_PARTS=has_parts,
            HAS_DROPOUT=dropout is not None,
            KEEP_TOTAL=keep_total and has_parts,
            BOUNDED=num_tokens is not None,
            BLOCK_T=block_t,
            BLOCK_C=next_power_of_2(channels),
            num_warps=num_warps,
        )
    return NormForward(out, total) if keep_total else out


def norm_gradient(
    gradient: Tensor,
    total: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    dropout: Dropout | None,
    projected_dtype: torch.dtype,
    num_tokens: Tensor | None = None,
) -> NormGradients:
    """Gradients of `residual_norm` with respect to its inputs.

    Args:
        gradient: Of the output, ``[T, C]``.
        total: What was normalised, ``[T, C]``.
        norm_weight: ``[C]``, contiguous.
        eps: As in the forward pass.
        dropout: As in the forward pass.
        projected_dtype: Dtype of the projected gradient.
        num_tokens: See `residual_norm`.
    """
    gradient, total = with_contiguous_rows(gradient), with_contiguous_rows(total)
    tokens, channels = gradient.shape
    device = gradient.device
    by_total = torch.empty(tokens, channels, dtype=gradient.dtype, device=device)
    separate = dropout is not None or projected_dtype != gradient.dtype
    by_projected = torch.empty_like(by_total, dtype=projected_dtype) if separate else by_total
    vectors = [torch.empty(channels, dtype=torch.float32, device=device) for _ in range(3)]
    block_t, steps, num_warps = _backward_blocks(tokens, channels)
    num_blocks = cdiv(tokens, steps * block_t)
    partial = torch.empty(num_blocks, 3, channels, dtype=torch.float32, device=device)
    if num_blocks > 0:
        start(
            residual_norm_backward_kernel,
            (num_blocks,),
            gradient,
            total,
            norm_weight,
            by_total,
            by_projected,
            partial,
            num_tokens,
            None if dropout is None else dropout.seed,
            tokens,
            channels,
            gradient.stride(0),
            total.stride(0),
            eps,
            steps=steps,
            **_dropout_arguments(dropout),
            HAS_DROPOUT=dropout is not None,
            SEPARATE=separate,
            BOUNDED=num_tokens is not None,
            BLOCK_T=block_t,
            BLOCK_C=next_power_of_2(channels),
            num_warps=num_warps,
        )
    block_c = 16
    start(
        add_partial_vectors_kernel,
        (cdiv(channels, block_c), 3),
        partial,
        *vectors,
        num_blocks,
        channels,
        BLOCK_PARTS=128,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return NormGradients(by_total, by_projected, *vectors)
