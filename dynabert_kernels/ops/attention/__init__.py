"""The multi-head attention sublayer on a prefix of its heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynabert_kernels.layout import PackedAttention
from dynabert_kernels.ops import _checks
from dynabert_kernels.ops._op import Op, needs_gradients
from dynabert_kernels.ops._sublayer import compute_name
from dynabert_kernels.ops.attention import _cpu, _cuda, _reference, _triton

_WHO = "attention"


class AttentionCall(NamedTuple):
    """The checked arguments of one call; see `attention`."""

    hidden: Tensor
    weights: PackedAttention
    num_heads: int
    num_heads_each: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    dropout_p: float
    attention_dropout_p: float
    seed: int | None
    attn_mask: Tensor | None
    compute: str

    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        weights = self.weights
        return (
            self.hidden,
            weights.qkv_weight,
            weights.qkv_bias,
            weights.out_weight,
            weights.out_bias,
            weights.norm_weight,
            weights.norm_bias,
            weights.norm_eps,
            self.num_heads,
            self.num_heads_each,
            self.cu_seqlens,
            self.max_seqlen,
            self.dropout_p,
            self.attention_dropout_p,
            self.seed,
            self.compute,
        )

    def describe(self) -> str:
        """Sizes for an error message."""
        sizes = f"hidden_size {self.weights.hidden_size}, head_dim {self.weights.head_dim}"
        return f"{sizes}, computed in {self.compute}"


def _fake(hidden: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(hidden)


def _why_not_native(call: AttentionCall) -> str | None:
    if call.attn_mask is not None:
        return "attn_mask given, which only the reference takes"
    return None


ATTENTION: Op[AttentionCall] = Op(
    "attention",
    schema=(
        "(Tensor hidden, Tensor qkv_weight, Tensor qkv_bias, Tensor out_weight, Tensor out_bias, "
        "Tensor norm_weight, Tensor norm_bias, float norm_eps, "
        "SymInt num_heads, Tensor? num_heads_each, Tensor cu_seqlens, SymInt max_seqlen, "
        "float dropout_p, float attention_dropout_p, SymInt? seed, str compute) -> Tensor"
    ),
    fake=_fake,
    reference=_reference.attention,
    why_not_native=_why_not_native,
    backends=(_cpu.BACKEND, _cuda.BACKEND, _triton.BACKEND),
)


def attention(
    hidden: Tensor,
    weights: PackedAttention,
    *,
    num_heads: int | Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    attention_dropout_p: float = 0.0,
    seed: int | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Post-norm self-attention sublayer on the first `num_heads` heads.

    Computes ``LayerNorm(dropout(concat(heads[:n]) @ out[:n] + out_bias) + hidden)`` within each
    sequence, and reads no other weight (DynaBERT, section 3.1). The softmax scale is
    ``1 / sqrt(head_dim)`` whatever the width. Half-precision tokens may come with float32
    weights, and ``torch.autocast`` sets the dtype of the matrix products; LayerNorm is computed
    in float32. Quantised weights (`dynabert_kernels.quantization`) have no gradients.

    Args:
        hidden: Tokens, ``[total_tokens, hidden_size]``; float32, bfloat16, float16 or float64.
        weights: Packed weights; see `dynabert_kernels.layout`.
        num_heads: Heads to use, 1 to ``weights.num_heads``; or an int32 tensor with one value per
            sequence, ``[batch_size]``, or one for the batch, ``[1]``, on the CPU or beside
            `hidden`. On a GPU its values are read by the kernels alone, so a captured graph serves
            every width; they are not checked, and a value out of range is clamped, which keeps
            memory safe and gives the result of another width. The reference reads them back, which
            waits for the GPU, and checks them.
        cu_seqlens: Ragged offsets, ``[batch_size + 1]``, int32. Sequences may be empty. On a GPU
            and beside a tensor `num_heads` there, the last offset may be less than `total_tokens`:
            rows past it belong to no sequence, and are undefined in the result and in the gradient
            of `hidden`.
        max_seqlen: Length of the longest sequence, or more. Where ``batch_size * max_seqlen`` is
            `total_tokens`, the batch is equal-length and nothing is padded.
        dropout_p: Probability of zeroing an element before the residual is added.
        attention_dropout_p: Probability of zeroing an attention weight.
        seed: None draws from torch's generator. An int in [0, 2**63) gives the counter-based
            masks of `dynabert_kernels.dropout`; give each layer and step its own.
        attn_mask: Extra mask for equal-length batches, on the reference only; broadcastable to
            ``[batch_size, num_heads, max_seqlen, max_seqlen]``. Bool (True where a key is seen)
            or floating-point (added to the scores). The head dimension may also hold all heads
            of the weights. A query that sees no key gets a zero context.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `hidden`.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, dtype, device or size is out of range.
        NotImplementedError: No backend may run this call, and the message lists each reason; or
            gradients of quantised weights are needed.
    """
    if not isinstance(weights, PackedAttention):
        raise TypeError(
            f"{_WHO}: weights={type(weights).__name__}, expected PackedAttention. "
            "Pack them with PackedAttention.from_hf."
        )
    weights.validate()
    _checks.check_hidden(_WHO, hidden, weights.qkv_weight, weights.hidden_size)
    _checks.check_ragged(_WHO, hidden, cu_seqlens, max_seqlen)
    limit = weights.num_heads
    num_heads, heads_each = _checks.resolve_width(
        _WHO, "num_heads", num_heads, cu_seqlens, limit, "heads"
    )
    _checks.check_dropout(_WHO, "dropout_p", dropout_p, seed)
    _checks.check_dropout(_WHO, "attention_dropout_p", attention_dropout_p, seed)
    call = AttentionCall(
        hidden,
        weights,
        num_heads,
        heads_each,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        attention_dropout_p,
        seed,
        attn_mask,
        compute_name(hidden, weights.quantization),
    )
    if weights.quantization is not None and needs_gradients(call):
        _checks.refuse_gradients(_WHO, weights.quantization)
    if attn_mask is not None:
        _check_mask(call, attn_mask)
    return ATTENTION(call)


def _check_mask(call: AttentionCall, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{_WHO}: attn_mask={kind}, expected a bool or floating-point tensor. "
            "True means that a key is seen; numbers are added to the scores."
        )
    if mask.device != call.hidden.device:
        raise ValueError(
            f"{_WHO}: attn_mask.device={mask.device}, expected {call.hidden.device}. "
            "Move it to the device of the tokens."
        )
    batch_size, seq_len = call.cu_seqlens.shape[0] - 1, call.max_seqlen
    if call.hidden.shape[0] != batch_size * seq_len:
        raise ValueError(
            f"{_WHO}: attn_mask with {call.hidden.shape[0]} tokens, expected {batch_size} x "
            f"{seq_len}. It needs sequences of equal length; keep the padding in."
        )
    heads = (1, call.num_heads, call.weights.num_heads)
    shape = mask.shape
    if (
        mask.dim() != 4
        or shape[0] not in (1, batch_size)
        or shape[1] not in heads
        or shape[2] not in (1, seq_len)
        or shape[3] not in (1, seq_len)
    ):
        raise ValueError(
            f"{_WHO}: attn_mask.shape={list(shape)}, expected a shape broadcastable to "
            f"[{batch_size}, {call.num_heads}, {seq_len}, {seq_len}]. Insert the missing sizes."
        )
