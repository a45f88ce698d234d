"""The feed-forward sublayer on Triton kernels: product with activation, product, row norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynabert_kernels.ops._op import Backend
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    return availability.why_not(
        call.hidden,
        (call.weights.up_weight, call.weights.down_weight),
        widths=call.intermediate_sizes,
        dropout=call.dropout_p > 0,
        quantization=call.weights.quantization,
    )


def ffn(
    hidden: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    activation: str,
    intermediate_size: int,
    intermediate_sizes: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_p: float,
    seed: int | None,
    compute: str,
) -> Tensor:
    """Run one call that `why_not` lets through; arguments as in the op's schema."""
    from dynabert_kernels.triton import launch

    hidden = launch.with_contiguous_rows(hidden)
    down_bias = down_bias.contiguous()
    with torch.cuda.device_of(hidden):
        inner = launch.linear(
            "rows",
            hidden,
            up_weight[:intermediate_size],
            up_bias[:intermediate_size].contiguous(),
            activation=activation,
        )
        projected = launch.linear(
            "columns", inner, down_weight[:intermediate_size], down_bias, residual=hidden
        )
        return launch.residual_norm(
            projected, down_bias, hidden, norm_weight.contiguous(), norm_bias.contiguous(), norm_eps
        )


BACKEND: Backend[FFNCall] = Backend(
    "triton",
    device=availability.DEVICE,
    run=ffn,
    why_not=why_not,
    unavailable=availability.triton_missing,
    unproven=availability.UNPROVEN,
)
