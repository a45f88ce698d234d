"""Consecutive layers in one call, where the C++ kernels can run all of them.

Not a third op with a reference of its own: the result is, bit for bit, that of `attention` and
`ffn` one after the other. It saves what lies between two ops, which for a narrow subnet is a large
part of the whole: their dispatch, and the points at which all threads wait for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops._op import forced_backend
from dynabert_kernels.ops._sublayer import compute_name

_LIBRARY = torch.library.Library("dynabert", "FRAGMENT")
_LIBRARY.define(
    "encoder.cpu(Tensor hidden, Tensor[] attention_weights, Tensor[] ffn_weights, "
    "float[] norm_eps, str activation, int[] num_heads, int[] intermediate_sizes, "
    "Tensor cu_seqlens, str compute) -> Tensor"
)
_NATIVE = torch.ops.dynabert.encoder.cpu


class EncoderLayer(NamedTuple):
    """One layer of a call: weights and width of its sublayers."""

    attention: PackedAttention
    ffn: PackedFFN
    num_heads: int
    intermediate_size: int


def encoder(hidden: Tensor, layers: Sequence[EncoderLayer], *, cu_seqlens: Tensor) -> Tensor | None:
    """Run `layers` in order, or return None where the ops have to run one by one.

    None means: gradients may be needed, another backend is forced, the call is traced, or some
    layer is not for the C++ kernels. The ops themselves then say why.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        layers: What to run.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `hidden`.

    Raises:
        ValueError: A shape, dtype or size is out of range.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forced_backend() not in (None, "cpu")
        or hidden.device.type != _cpu.DEVICE
        or _cpu.kernels_missing() is not None
        or not layers
    ):
        return None
    compute = compute_name(hidden, layers[0].ffn.quantization)
    activation = layers[0].ffn.activation
    attention_weights: list[Tensor] = []
    ffn_weights: list[Tensor] = []
    eps: list[float] = []
    for layer in layers:
        if not _fits(layer, hidden, compute, activation):
            return None
        attention, ffn = layer.attention, layer.ffn
        attention_weights += attention.elastic()
        attention_weights += (attention.out_bias, attention.norm_weight, attention.norm_bias)
        ffn_weights += ffn.elastic()
        ffn_weights += (ffn.down_bias, ffn.norm_weight, ffn.norm_bias)
        eps += (attention.norm_eps, ffn.norm_eps)
    result: Tensor = _NATIVE(
        hidden,
        attention_weights,
        ffn_weights,
        eps,
        activation,
        [layer.num_heads for layer in layers],
        [layer.intermediate_size for layer in layers],
        cu_seqlens,
        compute,
    )
    return result


def _fits(layer: EncoderLayer, hidden: Tensor, compute: str, activation: str) -> bool:
    attention, ffn = layer.attention, layer.ffn
    return (
        attention.quantization == ffn.quantization
        and compute_name(hidden, ffn.quantization) == compute
        and ffn.activation == activation
        and attention.head_dim % 8 == 0
        and _cpu.why_not(hidden, attention.qkv_weight, None, compute) is None
        and _cpu.why_not(hidden, ffn.up_weight, None, compute) is None
    )
