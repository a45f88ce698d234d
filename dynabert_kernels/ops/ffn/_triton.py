"""The feed-forward sublayer on Triton kernels: product with activation, product, row norm.

Width on the device: see `dynabert_kernels.triton.gemm`. Nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dynabert_kernels.ops._op import Backend
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    return availability.why_not(
        call.hidden, (weights.up_weight, weights.down_weight), dropout=call.dropout_p > 0
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
) -> Tensor:
    """Run one checked call; arguments as in the op's schema."""
    from dynabert_kernels.triton import launch

    tokens = hidden.shape[0]
    hidden = launch.with_contiguous_rows(hidden)
    width = launch.resolve_width(
        intermediate_size, intermediate_sizes, cu_seqlens, tokens, hidden.device
    )
    inner = launch.linear(
        "rows",
        hidden,
        up_weight[:intermediate_size],
        up_bias[:intermediate_size],
        width,
        activation=activation,
    )
    projected = launch.linear(
        "columns", inner, down_weight[:intermediate_size], down_bias, width, residual=hidden
    )
    return launch.residual_norm(projected, down_bias, hidden, norm_weight, norm_bias, norm_eps)


BACKEND: Backend[FFNCall] = Backend(
    "triton",
    device="cuda",
    run=ffn,
    why_not=why_not,
    unavailable=availability.triton_missing,
)
