"""The attention sublayer in plain PyTorch: the truth every other backend is tested against.

Letters: T total_tokens, B batch_size, S max_seqlen, H heads in use, D head_dim, C hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels import dropout
from dynabert_kernels.layout import PackedAttention
from dynabert_kernels.ops._checks import check_not_compiling, check_width_values
from dynabert_kernels.ops._sublayer import (
    WidthGroups,
    add_norm,
    compute_dtype,
    hidden_dropout,
    nested_prefixes,
    token_numbers,
)
from dynabert_kernels.varlen import offsets_of, position_in_sequence, sequence_of_token

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


def attention(call: AttentionCall) -> Tensor:
    """Run one call; see `dynabert_kernels.ops.attention.attention`."""
    weights, hidden = call.weights, call.hidden
    inputs = hidden.to(compute_dtype(hidden))
    if call.num_heads_each is not None and hidden.shape[0] > 0:
        projected = _project_by_width(call, inputs)
    else:
        tokens = slice(0, hidden.shape[0])
        projected = _project(call, inputs, weights.prefix(call.num_heads), tokens)
    dropped = hidden_dropout(projected, call.dropout_p, call.seed)
    return add_norm(dropped, hidden, weights.norm_weight, weights.norm_bias, weights.norm_eps)


def _project(
    call: AttentionCall, inputs: Tensor, weights: PackedAttention, tokens: Tensor | slice
) -> Tensor:
    """From tokens to what is added to them, ``[n, C]`` to ``[n, C]``: all sequences of `call` at
    one width; `tokens` are their places in the whole batch."""
    total_tokens, dtype = inputs.shape[0], inputs.dtype
    heads, head_dim = weights.num_heads, weights.head_dim
    inner = heads * head_dim
    qkv = F.linear(
        inputs,
        weights.qkv_weight.reshape(3 * inner, weights.hidden_size).to(dtype),
        weights.qkv_bias.reshape(3 * inner).to(dtype),
    )
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
    return torch.addmm(
        weights.out_bias.to(dtype),
        context,
        weights.out_weight.reshape(inner, weights.hidden_size).to(dtype),
    )


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


def _project_by_width(call: AttentionCall, inputs: Tensor) -> Tensor:
    check_not_compiling("attention", "num_heads")
    assert call.num_heads_each is not None
    widths = call.num_heads_each.tolist()
    check_width_values("attention", "num_heads", widths, call.weights.num_heads, "heads")
    device = inputs.device
    by_width = WidthGroups(widths, call.cu_seqlens.tolist(), device)
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
