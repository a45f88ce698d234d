"""The feed-forward sublayer on the C++ kernels (csrc/ffn)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops._op import Backend, Training, needs_gradients
from dynabert_kernels.ops._sublayer import token_dtype

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall

# Forward and backward with dropout 0.1, hidden_size 384, 1536 neurons, 2 threads on Zen 5, against
# the reference: bfloat16 0.91 of its speed at 128 tokens, 1.0 at 256, 1.15 at 2048, where packing
# the weights in each call takes little; float32 1.3 at 32 and 2.0 at 2048. In whole steps on
# SST-2's batches of 32, a bound of 640 for bfloat16 took 70 ms where the kernels alone took 64.
FEWEST_TRAINED = {"float32": 32, "bfloat16": 256}


def scope(call: FFNCall) -> str | None:
    """Why the kernels are not made for this call, or None."""
    return _cpu.scope(call.hidden, dropout=call.dropout_p > 0 and not needs_gradients(call))


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    return _cpu.why_not(call.hidden, call.weights.up_weight, call.intermediate_sizes, call.compute)


def slower(call: FFNCall) -> str | None:
    """Where training on the kernels does not pay, or None."""
    return _cpu.slower_training(call.hidden, fewest=FEWEST_TRAINED.get(call.compute, 0))


def _fake_training(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    intermediate_size, compute = others[8], others[-1]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        hidden.new_empty(hidden.shape[0], intermediate_size, dtype=token_dtype(compute)),
        hidden.new_empty(hidden.shape, dtype=torch.float32),
        hidden.new_empty(1, dtype=torch.int64),
    )


BACKEND: Backend[FFNCall] = Backend(
    "cpu",
    device=_cpu.DEVICE,
    scope=scope,
    why_not=why_not,
    unavailable=_cpu.kernels_missing,
    training=Training(
        kept=("pre_activation", "total", "mask_seed"),
        num_gradients=7,
        fake=_fake_training,
        slower=slower,
    ),
)
