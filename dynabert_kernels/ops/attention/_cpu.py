"""The attention sublayer on the C++ kernels (csrc/attention)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops._op import Backend

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


def scope(call: AttentionCall) -> str | None:
    """Why the kernels are not made for this call, or None."""
    return _cpu.scope(call.hidden, dropout=call.dropout_p > 0 or call.attention_dropout_p > 0)


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    matrix = call.weights.qkv_weight
    if matrix.shape[2] % 8:
        return f"head_dim={matrix.shape[2]}, expected a multiple of 8"
    return _cpu.why_not(call.hidden, matrix, call.num_heads_each, call.compute)


BACKEND: Backend[AttentionCall] = Backend(
    "cpu", device=_cpu.DEVICE, scope=scope, why_not=why_not, unavailable=_cpu.kernels_missing
)
