"""The attention sublayer on Triton kernels: projection, attention, projection, row norm.

Width on the device: see `dynabert_kernels.triton.gemm`. Nothing waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dynabert_kernels.ops._op import Backend
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    if weights.head_dim not in availability.HEAD_DIMS:
        allowed = ", ".join(map(str, availability.HEAD_DIMS))
        return f"head_dim={weights.head_dim}, expected one of {allowed}"
    return availability.why_not(
        call.hidden,
        (weights.qkv_weight, weights.out_weight),
        dropout=call.dropout_p > 0 or call.attention_dropout_p > 0,
    )


def attention(
    hidden: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_eps: float,
    num_heads: int,
    num_heads_each: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    attention_dropout_p: float,
    seed: int | None,
) -> Tensor:
    """Run one checked call; arguments as in the op's schema."""
    from dynabert_kernels.triton import launch

    tokens, hidden_size = hidden.shape
    head_dim = qkv_weight.shape[2]
    hidden = launch.with_contiguous_rows(hidden)
    width = launch.resolve_width(num_heads, num_heads_each, cu_seqlens, tokens, hidden.device)
    qkv = launch.linear(
        "rows",
        hidden,
        qkv_weight[:num_heads].view(num_heads * 3 * head_dim, hidden_size),
        qkv_bias[:num_heads].reshape(-1),
        width,
        width_unit=3 * head_dim,
    )
    context = launch.attention_core(
        qkv.view(tokens, num_heads, 3, head_dim), cu_seqlens, max_seqlen, width
    )
    projected = launch.linear(
        "columns",
        context.view(tokens, num_heads * head_dim),
        out_weight[:num_heads].view(num_heads * head_dim, hidden_size),
        out_bias,
        width,
        width_unit=head_dim,
        residual=hidden,
    )
    return launch.residual_norm(projected, out_bias, hidden, norm_weight, norm_bias, norm_eps)


BACKEND: Backend[AttentionCall] = Backend(
    "triton",
    device="cuda",
    run=attention,
    why_not=why_not,
    unavailable=availability.triton_missing,
)
