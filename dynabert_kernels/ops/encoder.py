"""Consecutive layers in one call, where the C++ or the Triton kernels can run all of them.

Not a third op with a reference of its own: the result is, bit for bit, that of `attention` and
`ffn` one after the other. It saves what lies between two ops, which for a narrow subnet is a large
part of the whole: their dispatch, and the points at which all threads wait for the slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dynabert_kernels.layout import PackedAttention, PackedFFN
from dynabert_kernels.ops import _cpu, _cuda, _cuda_encoder, _gpu_encoder
from dynabert_kernels.ops._sublayer import compute_name

_LIBRARY = torch.library.Library("dynabert", "FRAGMENT")
_LIBRARY.define(
    "encoder.cpu(Tensor hidden, Tensor[] attention_weights, Tensor[] ffn_weights, "
    "float[] norm_eps, str activation, int[] num_heads, int[] intermediate_sizes, "
    "Tensor cu_seqlens, str compute) -> Tensor"
)
NATIVE = torch.ops.dynabert.encoder.cpu
_dtype_of = attrgetter("dtype")


class EncoderLayer(NamedTuple):
    """One layer of a call: weights and width of its sublayers."""

    attention: PackedAttention
    ffn: PackedFFN
    num_heads: int
    intermediate_size: int


class KeptForms(NamedTuple):
    """What the C++ kernels take of released weights (`dynabert_kernels.released`)."""

    attention_weights: list[Tensor]
    ffn_weights: list[Tensor]
    forms: frozenset[str]

    @classmethod
    def of(cls, attention_weights: list[Tensor], ffn_weights: list[Tensor]) -> KeptForms | None:
        """None unless all weights are released ones."""
        weights: list[Any] = [*attention_weights, *ffn_weights]
        if not all(hasattr(weight, "prepared_key") for weight in weights):
            return None
        keys = [weight.prepared_key for weight in weights]
        forms = frozenset.intersection(*(frozenset(weight.forms) for weight in weights))
        return cls(keys[: len(attention_weights)], keys[len(attention_weights) :], forms)


@dataclass(frozen=True, eq=False)
class EncoderLayers:
    """The layers of a call as the op takes them: references, to be made once and used often.

    Attributes:
        attention_weights: Six tensors a layer.
        ffn_weights: Six tensors a layer.
        norm_eps: Two numbers a layer: attention, feed-forward.
        activation: Of every layer.
        quantization: Of every sublayer.
        num_heads: One number a layer.
        intermediate_sizes: One number a layer.
        kept: Set where all weights were released.
        device_widths: Heads and neurons of every layer, int32 ``[1]``, where the kernels read them
            on the device; the numbers above are then the most they may be.
    """

    attention_weights: list[Tensor]
    ffn_weights: list[Tensor]
    norm_eps: list[float]
    activation: str
    quantization: str | None
    num_heads: list[int]
    intermediate_sizes: list[int]
    kept: KeptForms | None
    device_widths: tuple[Tensor, Tensor] | None

    @classmethod
    def of(
        cls, layers: Sequence[EncoderLayer], device_widths: tuple[Tensor, Tensor] | None = None
    ) -> EncoderLayers | None:
        """The form of `layers`, or None if there are none or they differ in more than width."""
        if not layers:
            return None
        activation, quantization = layers[0].ffn.activation, layers[0].ffn.quantization
        attention_weights: list[Tensor] = []
        ffn_weights: list[Tensor] = []
        norm_eps: list[float] = []
        for attention, ffn, _, _ in layers:
            if (
                attention.quantization != quantization
                or ffn.quantization != quantization
                or ffn.activation != activation
                or attention.head_dim % 8 != 0
            ):
                return None
            attention_weights += attention.elastic()
            attention_weights += (attention.out_bias, attention.norm_weight, attention.norm_bias)
            ffn_weights += ffn.elastic()
            ffn_weights += (ffn.down_bias, ffn.norm_weight, ffn.norm_bias)
            norm_eps += (attention.norm_eps, ffn.norm_eps)
        return cls(
            attention_weights,
            ffn_weights,
            norm_eps,
            activation,
            quantization,
            [layer.num_heads for layer in layers],
            [layer.intermediate_size for layer in layers],
            KeptForms.of(attention_weights, ffn_weights),
            device_widths,
        )


def encoder(
    hidden: Tensor, layers: EncoderLayers, *, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor | None:
    """Run `layers` in order, or return None where the ops have to run one by one.

    None means: gradients may be needed, another backend is forced, the call is traced, some tensor
    is not for the kernels, or these have yet to be checked. The ops themselves then say why.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``.
        layers: What to run.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32.
        max_seqlen: Length of the longest sequence, or more.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `hidden`.

    Raises:
        ValueError: A shape, dtype or size is out of range.
    """
    if not hidden.is_cpu or _cuda.EMULATED:
        at_once = _cuda_encoder.run(hidden, layers, cu_seqlens)
        if at_once is not None:
            return at_once
    if layers.device_widths is not None:
        return None
    if not _cpu.runs_unforced(hidden):
        return _gpu_encoder.run(hidden, layers, cu_seqlens, max_seqlen)
    compute = compute_name(hidden, layers.quantization)
    if compute not in _cpu.COMPUTE or hidden.dtype not in _cpu.DTYPES:
        return None
    # Of the first weight of each sublayer, which its other tensors are like.
    matrices = (*layers.attention_weights[::6], *layers.ffn_weights[::6])
    if not set(map(_dtype_of, matrices)) <= _cpu.DTYPES:
        return None
    of_attention, of_ffn = layers.attention_weights, layers.ffn_weights
    # The dispatch of released weights comes to the same, and takes longer than a narrow layer. But
    # whoever watches operators is not to see tensors that cannot be read.
    if layers.kept is not None and _get_current_dispatch_mode() is None:
        of_attention, of_ffn, forms = layers.kept
        if compute not in forms:
            return None
    result: Tensor = NATIVE(
        hidden,
        of_attention,
        of_ffn,
        layers.norm_eps,
        layers.activation,
        layers.num_heads,
        layers.intermediate_sizes,
        cu_seqlens,
        compute,
    )
    return result
