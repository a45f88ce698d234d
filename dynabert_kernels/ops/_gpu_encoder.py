"""Consecutive layers on a card's kernels, past what the two ops check and choose for each sublayer.

A card is through with the layers of a short batch before the host has started them: two modules,
two ops and their dispatch take as long as the launches. What they would find is found once here.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dynabert_kernels import proof
from dynabert_kernels.ops import _cuda, _trust
from dynabert_kernels.ops._op import forced_backend
from dynabert_kernels.ops._sublayer import compute_name, token_dtype
from dynabert_kernels.ops.attention import _cuda as cuda_attention
from dynabert_kernels.ops.attention import _triton as triton_attention
from dynabert_kernels.ops.ffn import _cuda as cuda_ffn
from dynabert_kernels.ops.ffn import _triton as triton_ffn
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.encoder import EncoderLayers

_device_of = attrgetter("device")
_TENSORS = 6  # of a sublayer
_KERNELS = {
    proof.CUDA: (cuda_attention.KERNELS, cuda_ffn.KERNELS),
    proof.TRITON: (triton_attention.KERNELS, triton_ffn.KERNELS),
}


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
    backend = _backend(hidden, layers, compute)
    if backend is None:
        return None
    attention, ffn = _KERNELS[backend]
    for number, (heads, neurons) in enumerate(
        zip(layers.num_heads, layers.intermediate_sizes, strict=True)
    ):
        of_sublayer = slice(number * _TENSORS, (number + 1) * _TENSORS)
        attention_eps, ffn_eps = layers.norm_eps[2 * number : 2 * number + 2]
        hidden = attention.forward(
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
        hidden = ffn.forward(
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


def _backend(hidden: Tensor, layers: EncoderLayers, compute: str) -> str | None:
    """The backend that both ops would choose for every layer, without a first-use check; or None.

    None also where an op would go on to another backend than the one it asks first.
    """
    forced = forced_backend()
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        # Who watches or fakes the operators of a call is to see the two ops.
        or type(hidden) is not Tensor
        or _get_current_dispatch_mode() is not None
    ):
        return None
    backend = forced
    if forced is None:
        backend = proof.CUDA if _cuda.precedes(hidden, compute) else proof.TRITON
    if backend == proof.CUDA:
        runs = hidden.device.type == _cuda.DEVICE and _cuda.cuda_missing() is None
    elif backend == proof.TRITON:
        opted = forced is not None or availability.OPT_IN is None
        on_device = hidden.device.type == availability.DEVICE
        runs = opted and on_device and availability.triton_missing() is None
    else:
        return None
    if not runs:
        return None
    head_dims = {weight.shape[2] for weight in layers.attention_weights[::_TENSORS]}
    card = hidden.get_device()
    uses = {(backend, "attention", compute, size, False, card) for size in head_dims}
    if not uses | {(backend, "ffn", compute, None, False, card)} <= _trust.trusted:
        return None
    weights = (*layers.attention_weights, *layers.ffn_weights)
    matrices = (*weights[::_TENSORS], *weights[2::_TENSORS])
    dtype, quantization = token_dtype(compute), layers.quantization
    if backend == proof.CUDA:
        reason = _cuda.why_not(hidden, matrices, (), compute=dtype, quantization=quantization)
    else:
        reason = availability.why_not(hidden, matrices, compute=dtype, quantization=quantization)
    return backend if reason is None and set(map(_device_of, weights)) == {hidden.device} else None
