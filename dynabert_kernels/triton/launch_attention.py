"""Typed launchers of the attention core, forward and backward; see `launch`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynabert_kernels.triton import configs, launch
from dynabert_kernels.triton.attention_gradient import (
    attention_gradient_keys_kernel,
    attention_gradient_queries_kernel,
)
from dynabert_kernels.triton.attention_kernel import attention_forward_kernel
from dynabert_kernels.triton.dispatch import cdiv, next_power_of_2, start

if TYPE_CHECKING:
    from dynabert_kernels.triton.configs import AttentionConfig
    from dynabert_kernels.triton.launch import Dropout


def _varying(
    qkv: Tensor, cu_seqlens: Tensor, num_heads: int | Tensor, dropout: Dropout | None
) -> dict[str, Any]:
    """Arguments that no kernel is specialised on."""
    counts = num_heads if isinstance(num_heads, Tensor) else None
    assert counts is not None or num_heads == qkv.shape[1]
    dropped = dropout if dropout is not None and dropout.p > 0 else None
    p = 0.0 if dropped is None else dropped.p
    return {
        "cu_seqlens_ptr": cu_seqlens,
        "head_counts_ptr": counts,
        "seed_ptr": None if dropped is None else dropped.seed,
        "dropout_p": p,
        "keep_scale": 0.0 if p == 1 else 1 / (1 - p),
        "total_tokens": qkv.shape[0],
        "num_heads": qkv.shape[1],
        "counts_stride": 0 if counts is None or counts.numel() == 1 else 1,
    }


def attention_core(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_heads: int | Tensor,
    dropout: Dropout | None = None,
    keep_log_sum: bool = False,
    config: AttentionConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, ``[T, H, D]``; undefined past the last sequence and in unused heads.

    Args:
        qkv: ``[T, H, 3, D]``, contiguous.
        cu_seqlens: ``[batch_size + 1]``, int32, contiguous.
        max_seqlen: No sequence is longer.
        num_heads: H, or int32 ``[1]`` or ``[batch_size]`` on the device: heads from there on are
            not computed.
        dropout: Of the probabilities.
        keep_log_sum: Also return the base-2 logarithm of the sum of exp(scaled score), float32
            ``[H, T]``: what the gradient needs, rounded once.
        config: Overrides the table.
    """
    tokens, heads, _, head_dim = qkv.shape
    out = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    log_sum = torch.empty(heads, tokens, device=qkv.device) if keep_log_sum else None
    batch_size = cu_seqlens.numel() - 1
    if tokens > 0 and max_seqlen > 0 and batch_size > 0:
        if config is None:
            capability, num_sms = launch.card(qkv.device)
            config = configs.attention_config(
                max_seqlen=max_seqlen,
                head_dim=head_dim,
                dtype=qkv.dtype,
                capability=capability,
                dropout=dropout is not None and dropout.p > 0,
                heads_per_sm=batch_size * heads / num_sms,
                mean_seqlen=tokens / batch_size,
            )
        single_tile = max_seqlen <= config.block_keys
        num_blocks = cdiv(max_seqlen, config.block_queries)
        num_groups = cdiv(heads, config.heads)
        start(
            attention_forward_kernel,
            (batch_size * num_blocks * num_groups,),
            qkv,
            out,
            log_sum,
            **_varying(qkv, cu_seqlens, num_heads, dropout),
            scale_log2e=math.log2(math.e) / math.sqrt(head_dim),
            num_blocks=num_blocks,
            heads_per_program=config.heads,
            D=head_dim,
            BLOCK_D=next_power_of_2(head_dim),
            BLOCK_QUERIES=config.block_queries,
            BLOCK_KEYS=config.block_keys,
            SINGLE_TILE=single_tile,
            NUM_STAGES=config.num_stages,
            INPUT_PRECISION=launch.input_precision(qkv.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.max_registers,
        )
    return out if log_sum is None else (out, log_sum)


def attention_core_gradient(
    gradient: Tensor,
    qkv: Tensor,
    context: Tensor,
    log_sum: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_heads: int | Tensor,
    dropout: Dropout | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """The gradient of `qkv`, in its shape; undefined where the context is.

    Args:
        gradient: Of the context, ``[T, H, D]``, contiguous, in qkv's dtype.
        qkv: As in the forward pass; so are `cu_seqlens`, `max_seqlen`, `num_heads` and `dropout`.
        context: What `attention_core` returned, contiguous.
        log_sum: What it returned beside it.
        cu_seqlens: See `qkv`.
        max_seqlen: See `qkv`.
        num_heads: See `qkv`.
        dropout: See `qkv`.
        config: Overrides the table.
    """
    tokens, heads, _, head_dim = qkv.shape
    d_qkv = torch.empty_like(qkv)
    batch_size = cu_seqlens.numel() - 1
    if tokens == 0 or max_seqlen == 0 or batch_size == 0:
        return d_qkv
    if config is None:
        config = configs.attention_gradient_config(
            max_seqlen=max_seqlen,
            head_dim=head_dim,
            dtype=qkv.dtype,
            capability=launch.card(qkv.device)[0],
            dropout=dropout is not None and dropout.p > 0,
            mean_seqlen=tokens / batch_size,
        )
    one_pass = max_seqlen <= config.block_keys
    num_blocks = cdiv(max_seqlen, config.block_keys)
    options = _varying(qkv, cu_seqlens, num_heads, dropout) | {
        "scale": 1 / math.sqrt(head_dim),
        "scale_log2e": math.log2(math.e) / math.sqrt(head_dim),
        "num_blocks": num_blocks,
        "D": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "INPUT_PRECISION": launch.input_precision(qkv.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers,
    }
    delta = None
    if not one_pass:
        delta = torch.empty_like(log_sum)
        # The same shapes with the parts of queries and keys exchanged.
        start(
            attention_gradient_queries_kernel,
            (batch_size * num_blocks * heads,),
            gradient,
            qkv,
            context,
            log_sum,
            delta,
            d_qkv,
            BLOCK_QUERIES=config.block_keys,
            BLOCK_KEYS=config.block_queries,
            **options,
        )
    start(
        attention_gradient_keys_kernel,
        (batch_size * num_blocks * heads,),
        gradient,
        qkv,
        context if one_pass else None,
        log_sum,
        delta,
        d_qkv,
        BLOCK_QUERIES=config.block_queries,
        BLOCK_KEYS=config.block_keys,
        ONE_PASS=one_pass,
        **options,
    )
    return d_qkv
