"""The attention sublayer on the C++ kernels (csrc/attention)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops._op import Backend, Training, needs_gradients
from dynabert_kernels.ops._sublayer import token_dtype

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall

# Forward and backward with dropout 0.1, 12 heads of 32, 2 threads on Zen 5, against the reference:
# 1.7 times as fast at 32 tokens in both dtypes, 1.4 (bfloat16) and 2.0 (float32) at 2048.
FEWEST_TRAINED = 32


def scope(call: AttentionCall) -> str | None:
    """Why the kernels are not made for this call, or None."""
    dropout = call.dropout_p > 0 or call.attention_dropout_p > 0
    return _cpu.scope(call.hidden, dropout=dropout and not needs_gradients(call))


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    matrix = call.weights.qkv_weight
    if matrix.shape[2] % 8:
        return f"head_dim={matrix.shape[2]}, expected a multiple of 8"
    return _cpu.why_not(call.hidden, matrix, call.num_heads_each, call.compute)


def slower(call: AttentionCall) -> str | None:
    """Where training on the kernels does not pay, or None."""
    return _cpu.slower_training(call.hidden, fewest=FEWEST_TRAINED)


def _fake_training(hidden: Tensor, qkv_weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    num_heads, compute = others[6], others[-1]
    tokens, head_dim, dtype = hidden.shape[0], qkv_weight.shape[2], token_dtype(compute)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        hidden.new_empty(tokens, num_heads, 3, head_dim, dtype=dtype),
        hidden.new_empty(tokens, num_heads, head_dim, dtype=dtype),
        hidden.new_empty(num_heads, tokens, dtype=torch.float32),
        hidden.new_empty(hidden.shape, dtype=torch.float32),
        hidden.new_empty(1, dtype=torch.int64),
    )


BACKEND: Backend[AttentionCall] = Backend(
    "cpu",
    device=_cpu.DEVICE,
    scope=scope,
    why_not=why_not,
    unavailable=_cpu.kernels_missing,
    training=Training(
        kept=("qkv", "context", "log_sum", "total", "mask_seed"),
        num_gradients=7,
        fake=_fake_training,
        slower=slower,
    ),
)
