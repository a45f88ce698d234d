"""The feed-forward sublayer on the C++ kernels (csrc/ffn)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops._op import Backend

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def scope(call: FFNCall) -> str | None:
    """Why the kernels are not made for this call, or None."""
    return _cpu.scope(call.hidden, dropout=call.dropout_p > 0)


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    return _cpu.why_not(call.hidden, call.weights.up_weight, call.intermediate_sizes, call.compute)


BACKEND: Backend[FFNCall] = Backend(
    "cpu", device=_cpu.DEVICE, scope=scope, why_not=why_not, unavailable=_cpu.kernels_missing
)
