"""The attention sublayer on Triton kernels: projection, attention, projection, row norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
        widths=call.num_heads_each,
        dropout=call.dropout_p > 0 or call.attention_dropout_p > 0,
        quantization=weights.quantization,
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
    compute: str,
) -> Tensor:
    """Run one call that `why_not` lets through; arguments as in the op's schema."""
    from dynabert_kernels.triton import launch

    tokens, hidden_size = hidden.shape
    head_dim = qkv_weight.shape[2]
    inner = num_heads * head_dim
    hidden = launch.with_contiguous_rows(hidden)
    out_bias = out_bias.contiguous()
    with torch.cuda.device_of(hidden):
        qkv = launch.linear(
            "rows",
            hidden,
            qkv_weight[:num_heads].view(3 * inner, hidden_size),
            qkv_bias[:num_heads].reshape(3 * inner),
        )
        context = launch.attention_core(
            qkv.view(tokens, num_heads, 3, head_dim), cu_seqlens.contiguous(), max_seqlen
        )
        projected = launch.linear(
            "columns",
            context.view(tokens, inner),
            out_weight[:num_heads].view(inner, hidden_size),
            out_bias,
            residual=hidden,
        )
        return launch.residual_norm(
            projected, out_bias, hidden, norm_weight.contiguous(), norm_bias.contiguous(), norm_eps
        )


BACKEND: Backend[AttentionCall] = Backend(
    "triton",
    device=availability.DEVICE,
    run=attention,
    why_not=why_not,
    unavailable=availability.triton_missing,
    unproven=availability.UNPROVEN,
)
