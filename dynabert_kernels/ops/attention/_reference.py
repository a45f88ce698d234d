"""The attention sublayer in plain PyTorch: the truth every other backend is tested against.

Letters: T total_tokens, B batch_size, S max_seqlen, H heads in use, D head_dim, C hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels import dropout
from dynabert_kernels.layout import PackedAttention
from dynabert_kernels.ops._checks import check_not_compiling
from dynabert_kernels.ops._sublayer import (
    WidthGroups,
    add_norm,
    hidden_dropout,
    nested_prefixes,
    read_widths,
    token_dtype,
    token_numbers,
)
from dynabert_kernels.quantization import (
    QuantizedWeight,
    integer_product,
    quantize_channels,
    quantize_rows,
    spread,
)
from dynabert_kernels.varlen import offsets_of, position_in_sequence, sequence_of_token

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


def attention(call: AttentionCall) -> Tensor:
    """Run one call; see `dynabert_kernels.ops.attention.attention`."""
    if call.compute == "int8":
        with torch.autocast(call.hidden.device.type, enabled=False):
            return _sublayer(call)
    return _sublayer(call)


def _sublayer(call: AttentionCall) -> Tensor:
    weights, hidden = call.weights, call.hidden
    widths: list[int] = []
    offsets: list[int] = []
    total_tokens = hidden.shape[0]
    if call.num_heads_each is not None and total_tokens > 0:
        limit = weights.num_heads
        widths, offsets = read_widths(
            "attention", "num_heads", call.num_heads_each, call.cu_seqlens, limit, "heads"
        )
        if offsets[-1] < total_tokens:
            hidden = hidden[: offsets[-1]]
    inputs = hidden.to(token_dtype(call.compute))
    if widths and hidden.shape[0] > 0:
        projected = _project_by_width(call, inputs, widths, offsets)
    else:
        tokens = slice(0, hidden.shape[0])
        all_heads = Int8Attention.of(weights) if call.compute == "int8" else weights
        projected = _project(call, inputs, all_heads.prefix(call.num_heads), tokens)
    dropped = hidden_dropout(projected, call.dropout_p, call.seed)
    result = add_norm(dropped, hidden, weights.norm_weight, weights.norm_bias, weights.norm_eps)
    if hidden is call.hidden:
        return result
    return F.pad(result, (0, 0, 0, total_tokens - hidden.shape[0]))


class Int8Attention(NamedTuple):
    """The products of a sublayer in integers, as `dynabert_kernels.quantization` defines them."""

    qkv: QuantizedWeight
    qkv_bias: Tensor
    out: QuantizedWeight
    out_bias: Tensor

    @classmethod
    def of(cls, weights: PackedAttention) -> Int8Attention:
        """Quantise all heads, so that every width has the same integers and scales.

        Raises:
            ValueError: A weight is not finite.
        """
        return cls(
            quantize_rows("qkv_weight", weights.qkv_weight),
            weights.qkv_bias.float(),
            quantize_channels("out_weight", weights.out_weight),
            weights.out_bias.float(),
        )

    @property
    def num_heads(self) -> int:
        """Heads these products hold."""
        return self.qkv_bias.shape[0]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.qkv_bias.shape[2]

    def prefix(self, num_heads: int) -> Int8Attention:
        """The first heads, with the scales of all."""
        qkv, out = self.qkv, self.out
        return self._replace(
            qkv=QuantizedWeight(qkv.values[:num_heads], qkv.scales[:num_heads]),
            qkv_bias=self.qkv_bias[:num_heads],
            out=QuantizedWeight(out.values[:num_heads], out.scales),
        )

    def project_in(self, inputs: Tensor) -> Tensor:
        """``[n, C]`` to ``[n, H * 3 * D]``, float32."""
        values = self.qkv.values.flatten(0, 2).t()
        product = integer_product(spread(inputs), values)
        return product * self.qkv.scales.flatten() + self.qkv_bias.flatten()

    def project_out(self, context: Tensor) -> Tensor:
        """``[n, H * D]`` to ``[n, C]``, float32."""
        product = integer_product(context, self.out.values.flatten(0, 1))
        return product * self.out.scales + self.out_bias


def _project_in(inputs: Tensor, weights: PackedAttention | Int8Attention) -> Tensor:
    if isinstance(weights, Int8Attention):
        return weights.project_in(inputs)
    rows, dtype = 3 * weights.num_heads * weights.head_dim, inputs.dtype
    return F.linear(
        inputs,
        weights.qkv_weight.reshape(rows, weights.hidden_size).to(dtype),
        weights.qkv_bias.reshape(rows).to(dtype),
    )


def _project_out(context: Tensor, weights: PackedAttention | Int8Attention) -> Tensor:
    if isinstance(weights, Int8Attention):
        return weights.project_out(context)
    matrix = weights.out_weight.reshape(context.shape[1], weights.hidden_size)
    return torch.addmm(weights.out_bias.to(context.dtype), context, matrix.to(context.dtype))


def _project(
    call: AttentionCall,
    inputs: Tensor,
    weights: PackedAttention | Int8Attention,
    tokens: Tensor | slice,
) -> Tensor:
    """From tokens to what is added to them, ``[n, C]`` to ``[n, C]``: all sequences of `call` at
    one width; `tokens` are their places in the whole batch."""
    total_tokens = inputs.shape[0]
    heads, head_dim = weights.num_heads, weights.head_dim
    inner = heads * head_dim
    qkv = _project_in(inputs, weights)
    batch_size, seq_len = call.cu_seqlens.shape[0] - 1, call.max_seqlen
    by_head = (batch_size, seq_len, heads, 3, head_dim)
    if total_tokens == batch_size * seq_len:
        mask = call.attn_mask
        if mask is not None and mask.shape[1] != 1:
            mask = mask[:, :heads]
        context = _attend(qkv.view(by_head), mask, call, tokens, None).reshape(total_tokens, inner)
    else:
        slots = _padded_slots(call.cu_seqlens, total_tokens, seq_len)
        # Zeros and not a gather of some token: 0 x NaN would carry a NaN to other sequences.
        padded = qkv.new_zeros(batch_size * seq_len, 3 * inner).index_copy(0, slots, qkv)
        seen = _seen_keys(call.cu_seqlens, seq_len)
        context = _attend(padded.view(by_head), seen, call, tokens, slots)
        context = context.reshape(batch_size * seq_len, inner).index_select(0, slots)
    return _project_out(context, weights)


def _padded_slots(cu_seqlens: Tensor, total_tokens: int, seq_len: int) -> Tensor:
    """Where each token goes in the padded batch, ``[T]``, int64."""
    row = sequence_of_token(cu_seqlens, total_tokens)
    return row * seq_len + position_in_sequence(cu_seqlens, total_tokens)


def _seen_keys(cu_seqlens: Tensor, seq_len: int) -> Tensor:
    """Real keys of each sequence, ``[B, 1, 1, S]``; an empty sequence sees its first zero key."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp(min=1)
    keys = torch.arange(seq_len, dtype=lengths.dtype, device=lengths.device)
    return (keys < lengths[:, None])[:, None, None]


def _attend(
    qkv: Tensor,
    mask: Tensor | None,
    call: AttentionCall,
    tokens: Tensor | slice,
    slots: Tensor | None,
) -> Tensor:
    """Scaled dot-product attention of ``[B, S, H, 3, D]``, giving ``[B, S, H, D]``."""
    with_dropout = call.attention_dropout_p > 0
    by_part = qkv.permute(3, 0, 2, 1, 4)  # [3, B, H, S, D]
    if with_dropout:
        by_part = by_part.contiguous()  # one copy for the products of all three
    query, key, value = by_part.unbind(0)
    blind: Tensor | None = None
    if call.attn_mask is not None and mask is not None:
        mask, blind = _split_blind(mask, query.dtype)
    if with_dropout:
        context = _attend_dropped(query, key, value, mask, call, tokens, slots)
    else:
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if blind is not None:
        context = context.masked_fill(blind, 0)
    return context.transpose(1, 2)


def _attend_dropped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    call: AttentionCall,
    tokens: Tensor | slice,
    slots: Tensor | None,
) -> Tensor:
    """Attention with dropout on its probabilities, seeded (`dynabert_kernels.dropout`) or not."""
    batch_size, heads, seq_len, head_dim = query.shape
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
    scores = scores * head_dim**-0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1)
    if call.seed is None:
        return dropout.unseeded(probabilities.to(value.dtype), call.attention_dropout_p) @ value
    places = token_numbers(tokens, query.device)
    if slots is not None:
        places = places.new_zeros(batch_size * seq_len).index_copy(0, slots, places)
    numbers = dropout.attention_uniform(call.seed, places.view(batch_size, seq_len), heads, seq_len)
    probabilities = dropout.apply_mask(probabilities, numbers, call.attention_dropout_p)
    return probabilities.to(value.dtype) @ value


def _split_blind(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries that see no key, ``[.., .., .., 1]``, and a mask in which these see every key.

    A query that sees nothing would give 0 / 0. The lowest finite number hides a key as -inf does:
    masks made in float32 overflow in half precision.
    """
    if mask.dtype == torch.bool:
        blind = ~mask.any(dim=-1, keepdim=True)
        return mask | blind, blind
    added = mask.to(dtype)
    unseen = (mask <= torch.finfo(mask.dtype).min) | (added == -torch.inf)
    blind = unseen.all(dim=-1, keepdim=True)
    return added.masked_fill(blind, 0), blind


def _project_by_width(
    call: AttentionCall, inputs: Tensor, widths: list[int], offsets: list[int]
) -> Tensor:
    check_not_compiling("attention", "num_heads")  # Dynamo also starts at this frame, on its own
    device = inputs.device
    by_width = WidthGroups(widths, offsets, device)
    prefixes: Mapping[int, PackedAttention | Int8Attention]
    if call.compute == "int8":
        quantized = Int8Attention.of(call.weights)
        prefixes = {width: quantized.prefix(width) for width in widths}
    else:
        prefixes = nested_prefixes(call.weights, widths, inputs.dtype)
    projected = []
    for group, part in zip(by_width.groups, by_width.split(inputs), strict=True):
        mask = call.attn_mask
        if mask is not None and mask.shape[0] != 1:
            mask = mask[torch.tensor(group.rows, device=device)]
        alone = call._replace(
            cu_seqlens=offsets_of(group.lengths, device),
            max_seqlen=max(group.lengths),
            attn_mask=mask,
        )
        projected.append(_project(alone, part, prefixes[group.width], group.tokens))
    return by_width.merge(projected)
