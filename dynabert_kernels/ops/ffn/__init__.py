"""The feed-forward sublayer on a prefix of its neurons."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynabert_kernels.layout import PackedFFN
from dynabert_kernels.ops import _checks
from dynabert_kernels.ops._op import Op, needs_gradients
from dynabert_kernels.ops._sublayer import compute_name
from dynabert_kernels.ops.ffn import _cpu, _cuda, _reference, _triton

_WHO = "ffn"


class FFNCall(NamedTuple):
    """The checked arguments of one call; see `ffn`."""

    hidden: Tensor
    weights: PackedFFN
    intermediate_size: int
    intermediate_sizes: Tensor | None
    cu_seqlens: Tensor | None
    dropout_p: float
    seed: int | None
    compute: str

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        weights = self.weights
        return (
            self.hidden,
            weights.up_weight,
            weights.up_bias,
            weights.down_weight,
            weights.down_bias,
            weights.norm_weight,
            weights.norm_bias,
            weights.norm_eps,
            weights.activation,
            self.intermediate_size,
            self.intermediate_sizes,
            self.cu_seqlens,
            self.dropout_p,
            self.seed,
            self.compute,
        )

    def describe(self) -> str:
        """Sizes for an error message."""
        weights = self.weights
        return (
            f"hidden_size {weights.hidden_size}, {weights.activation}, computed in {self.compute}"
        )


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


FFN: Op[FFNCall] = Op(
    "ffn",
    schema=(
        "(Tensor hidden, Tensor up_weight, Tensor up_bias, Tensor down_weight, Tensor down_bias, "
        "Tensor norm_weight, Tensor norm_bias, float norm_eps, str activation, "
        "SymInt intermediate_size, Tensor? intermediate_sizes, Tensor? cu_seqlens, "
        "float dropout_p, SymInt? seed, str compute) -> Tensor"
    ),
    fake=_fake,
    reference=_reference.ffn,
    backends=(_cpu.BACKEND, _cuda.BACKEND, _triton.BACKEND),
)


def ffn(
    hidden: Tensor,
    weights: PackedFFN,
    *,
    intermediate_size: int | Tensor,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Post-norm feed-forward sublayer on the first `intermediate_size` neurons.

    Computes ``LayerNorm(dropout(act(hidden @ up[:n].T + up_bias[:n]) @ down[:n] + down_bias) +
    hidden)`` and reads no other weight (DynaBERT, section 3.1). Half-precision tokens may come
    with float32 weights, and ``torch.autocast`` sets the dtype of the matrix products; LayerNorm
    is computed in float32. Quantised weights (`dynabert_kernels.quantization`) have no gradients.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``; float32, bfloat16, float16 or float64.
        weights: Packed weights; see `dynabert_kernels.layout`.
        intermediate_size: Neurons to use, 1 to ``weights.intermediate_size``; or an int32 tensor
            with one value per sequence, ``[batch_size]``, or one for the batch, ``[1]``, on the
            CPU or beside `hidden`. On a GPU its values are read by the kernels alone, so a captured
            graph serves every width; they are not checked, and a value out of range is clamped,
            which keeps memory safe and gives the result of another width. The reference reads them
            back, which waits for the GPU, and checks them.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32; needed beside a tensor
            `intermediate_size`. Where that is on a GPU, the last offset may be less than
            `total_tokens`: rows past it belong to no sequence, and are undefined in the result and
            in the gradient of `hidden`.
        dropout_p: Probability of zeroing an element before the residual is added.
        seed: None draws from torch's generator. An int in [0, 2**63) gives the counter-based
            mask of `dynabert_kernels.dropout`; give each layer and step its own.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `hidden`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, dtype, device or size is out of range.
        NotImplementedError: No backend may run this call, and the message lists each reason; or
            gradients of quantised weights are needed.
    """
    if not isinstance(weights, PackedFFN):
        raise TypeError(
            f"{_WHO}: weights={type(weights).__name__}, expected PackedFFN. "
            "Pack them with PackedFFN.from_hf."
        )
    weights.validate()
    _checks.check_hidden(_WHO, hidden, weights.up_weight, weights.hidden_size)
    if cu_seqlens is not None:
        _checks.check_ragged(_WHO, hidden, cu_seqlens, None)
    limit = weights.intermediate_size
    intermediate_size, sizes = _checks.resolve_width(
        _WHO, "intermediate_size", intermediate_size, cu_seqlens, limit, "neurons"
    )
    _checks.check_dropout(_WHO, "dropout_p", dropout_p, seed)
    compute = compute_name(hidden, weights.quantization)
    call = FFNCall(hidden, weights, intermediate_size, sizes, cu_seqlens, dropout_p, seed, compute)
    if weights.quantization is not None and needs_gradients(call):
        _checks.refuse_gradients(_WHO, weights.quantization)
    return FFN(call)
