"""Consecutive layers on Triton kernels, past what the two ops check and choose for each sublayer.

A card is through with the layers of a short batch before the host has started them: two modules,
two ops and their dispatch take as long as the launches. What they would find is found once here.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dynabert_kernels.ops import _trust
from dynabert_kernels.ops._op import forced_backend
from dynabert_kernels.ops._sublayer import compute_name, token_dtype
from dynabert_kernels.ops.attention._triton import KERNELS as ATTENTION
from dynabert_kernels.ops.ffn._triton import KERNELS as FFN
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.encoder import EncoderLayers

_device_of = attrgetter("device")
_TENSORS = 6  # of a sublayer


def run(
    hidden: Tensor, layers: EncoderLayers, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor | None:
    """The layers in order, or None where the ops have to run one by one and say why.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        layers: What to run.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32.
        max_seqlen: No sequence is longer.
    """
    compute = compute_name(hidden, layers.quantization)
    if not _may_run(hidden, layers, compute):
        return None
    for number, (heads, neurons) in enumerate(
        zip(layers.num_heads, layers.intermediate_sizes, strict=True)
    ):
        of_sublayer = slice(number * _TENSORS, (number + 1) * _TENSORS)
        attention_eps, ffn_eps = layers.norm_eps[2 * number : 2 * number + 2]
        hidden = ATTENTION.forward(
            hidden,
            *layers.attention_weights[of_sublayer],
            attention_eps,
            heads,
            None,
            cu_seqlens,
            max_seqlen,
            0.0,
            0.0,
            None,
            compute,
        )
        hidden = FFN.forward(
            hidden,
            *layers.ffn_weights[of_sublayer],
            ffn_eps,
            layers.activation,
            neurons,
            None,
            None,
            0.0,
            None,
            compute,
        )
    return hidden


def _may_run(hidden: Tensor, layers: EncoderLayers, compute: str) -> bool:
    """Whether both ops would choose these kernels for every layer, without a first-use check."""
    forced = forced_backend()
    if (
        hidden.device.type != availability.DEVICE
        or forced not in (None, "triton")
        or (forced is None and availability.OPT_IN is not None)
        or availability.triton_missing() is not None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # Who watches or fakes the operators of a call is to see the two ops.
        or type(hidden) is not Tensor
        or _get_current_dispatch_mode() is not None
    ):
        return False
    head_dims = {weight.shape[2] for weight in layers.attention_weights[::_TENSORS]}
    card = hidden.get_device()
    uses = {("attention", compute, head_dim, False, card) for head_dim in head_dims}
    if not uses | {("ffn", compute, None, False, card)} <= _trust.trusted:
        return False
    weights = (*layers.attention_weights, *layers.ffn_weights)
    matrices = (*weights[::_TENSORS], *weights[2::_TENSORS])
    reason = availability.why_not(
        hidden, matrices, compute=token_dtype(compute), quantization=layers.quantization
    )
    return reason is None and set(map(_device_of, weights)) == {hidden.device}
