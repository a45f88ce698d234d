"""The attention sublayer on Triton kernels: projection, attention, projection, row norm.

Letters: T total_tokens, H heads in use, D head_dim, C hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynabert_kernels import proof
from dynabert_kernels.ops import _triton, _trust
from dynabert_kernels.ops._op import Backend, Training
from dynabert_kernels.ops._sublayer import token_dtype
from dynabert_kernels.ops.attention._arguments import Arguments, call_of
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


class _Kept(NamedTuple):
    """What the gradient needs besides the arguments."""

    qkv: Tensor  # [T, H, 3, D]
    context: Tensor  # [T, H, D]
    log_sum: Tensor  # [H, T], float32
    total: Tensor  # [T, C], what was normalised
    mask_seed: Tensor  # [1], int64


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    if weights.head_dim not in availability.HEAD_DIMS:
        allowed = ", ".join(map(str, availability.HEAD_DIMS))
        return f"head_dim={weights.head_dim}, expected one of {allowed}"
    return availability.why_not(
        call.hidden,
        (weights.qkv_weight, weights.out_weight),
        compute=token_dtype(call.compute),
        quantization=weights.quantization,
    )


def _inference(*arguments: Any) -> Tensor:
    return _forward(Arguments(*arguments), for_gradient=False)[0]


def _training(*arguments: Any) -> tuple[Tensor, ...]:
    output, kept = _forward(Arguments(*arguments), for_gradient=True)
    assert kept is not None
    return (output, *kept)


def _forward(call: Arguments, *, for_gradient: bool) -> tuple[Tensor, _Kept | None]:
    from dynabert_kernels.triton.launch import with_contiguous_rows
    from dynabert_kernels.triton.launch_attention import attention_core
    from dynabert_kernels.triton.launch_gemm import columns_product, rows_product
    from dynabert_kernels.triton.launch_norm import residual_norm

    hidden, cu_seqlens = with_contiguous_rows(call.hidden), call.cu_seqlens.contiguous()
    heads = call.trained_heads if for_gradient else call.num_heads
    tokens, head_dim = hidden.shape[0], call.qkv_weight.shape[2]
    dtype, out_bias = token_dtype(call.compute), call.out_bias.contiguous()
    with torch.cuda.device_of(hidden):
        width = _triton.Width.of(heads, call.num_heads_each, cu_seqlens, tokens)
        seed = _triton.draw_seed(call.seed, hidden.device, is_used=call.drops)
        dropout = _triton.dropout_of(call.dropout_p, seed)
        product = rows_product(
            hidden.to(dtype),
            _triton.matrix_prefix(call.qkv_weight, heads, dtype),
            _triton.vector_prefix(call.qkv_bias, heads),
            width=width.rows,
            unit=3 * head_dim,
        )
        assert isinstance(product, Tensor)
        qkv = product.view(tokens, heads, 3, head_dim)
        attended = attention_core(
            qkv,
            cu_seqlens,
            call.max_seqlen,
            num_heads=heads if width.each is None else width.each,
            dropout=_triton.dropout_of(call.attention_dropout_p, seed),
            keep_log_sum=for_gradient,
        )
        context, log_sum = attended if isinstance(attended, tuple) else (attended, None)
        projected = columns_product(
            context.view(tokens, heads * head_dim),
            _triton.matrix_prefix(call.out_weight, heads, dtype),
            width=width.rows,
            unit=head_dim,
            bias=out_bias,
            residual=hidden,
            dropout=dropout,
        )
        normed = residual_norm(
            projected,
            out_bias,
            hidden,
            call.norm_weight.contiguous(),
            call.norm_bias.contiguous(),
            call.norm_eps,
            dropout=dropout,
            num_tokens=width.num_tokens,
            keep_total=for_gradient,
        )
    if isinstance(normed, Tensor):
        return normed, None
    assert log_sum is not None
    return normed.out, _Kept(qkv, context, log_sum, normed.total, seed)


def _backward(gradient: Tensor, *others: Any) -> tuple[Tensor, ...]:
    from dynabert_kernels.triton.launch import with_contiguous_rows
    from dynabert_kernels.triton.launch_attention import attention_core_gradient
    from dynabert_kernels.triton.launch_gemm import rows_product
    from dynabert_kernels.triton.launch_norm import norm_gradient
    from dynabert_kernels.triton.weight_gradient import weight_gradient

    number = len(_Kept._fields)
    kept, call = _Kept(*others[:number]), Arguments(*others[number:])
    hidden, cu_seqlens = with_contiguous_rows(call.hidden), call.cu_seqlens.contiguous()
    tokens, heads, head_dim = hidden.shape[0], call.trained_heads, call.qkv_weight.shape[2]
    dtype, limit = token_dtype(call.compute), call.qkv_weight.shape[0]
    with torch.cuda.device_of(hidden):
        width = _triton.Width.of(heads, call.num_heads_each, cu_seqlens, tokens)
        norm = norm_gradient(
            with_contiguous_rows(gradient),
            kept.total,
            call.norm_weight.contiguous(),
            call.norm_eps,
            dropout=_triton.dropout_of(call.dropout_p, kept.mask_seed),
            projected_dtype=dtype,
            num_tokens=width.num_tokens,
        )
        context_gradient = rows_product(
            norm.projected,
            _triton.matrix_prefix(call.out_weight, heads, dtype),
            None,
            width=width.rows,
            unit=head_dim,
        )
        assert isinstance(context_gradient, Tensor)
        out_weight, _ = weight_gradient(
            kept.context.view(tokens, heads * head_dim),
            norm.projected,
            width=width.rows,
            unit=head_dim,
            limit=limit,
            dtype=call.out_weight.dtype,
            with_bias=False,
        )
        qkv_gradient = attention_core_gradient(
            context_gradient.view(tokens, heads, head_dim),
            kept.qkv,
            kept.context,
            kept.log_sum,
            cu_seqlens,
            call.max_seqlen,
            num_heads=heads if width.each is None else width.each,
            dropout=_triton.dropout_of(call.attention_dropout_p, kept.mask_seed),
        ).view(tokens, heads * 3 * head_dim)
        qkv_weight, qkv_bias = weight_gradient(
            qkv_gradient,
            hidden.to(dtype),
            width=width.rows,
            unit=3 * head_dim,
            limit=limit,
            dtype=call.qkv_weight.dtype,
            with_bias=True,
        )
        assert qkv_bias is not None
        hidden_gradient = _triton.gradient_of_sum(
            qkv_gradient,
            _triton.matrix_prefix(call.qkv_weight, heads, dtype),
            width,
            unit=3 * head_dim,
            through_residual=norm.total,
        )
    return (
        hidden_gradient,
        qkv_weight.view(call.qkv_weight.shape),
        qkv_bias.view(call.qkv_bias.shape).to(call.qkv_bias.dtype),
        out_weight.view(call.out_weight.shape),
        norm.bias.to(call.out_bias.dtype),
        norm.norm_weight.to(call.norm_weight.dtype),
        norm.norm_bias.to(call.norm_bias.dtype),
    )


def _fake_training(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    hidden, heads, head_dim = call.hidden, call.trained_heads, call.qkv_weight.shape[2]
    tokens, dtype = hidden.shape[0], token_dtype(call.compute)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        *_Kept(
            hidden.new_empty(tokens, heads, 3, head_dim, dtype=dtype),
            hidden.new_empty(tokens, heads, head_dim, dtype=dtype),
            hidden.new_empty(heads, tokens, dtype=torch.float32),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
            hidden.new_empty(1, dtype=torch.int64),
        ),
    )


KERNELS = _trust.TrainingKernels(
    proof.TRITON,
    "attention",
    has_heads=True,
    forward=_inference,
    training=_training,
    backward=_backward,
    like_training=_fake_training,
    call_of=call_of,
    num_kept=len(_Kept._fields),
    num_gradients=7,
)


def _doubt(call: AttentionCall, trains: bool) -> str | None:
    hidden = call.hidden
    use = (
        proof.TRITON,
        "attention",
        call.compute,
        call.weights.qkv_weight.size(2),
        trains,
        hidden.get_device(),
    )
    return None if use in _trust.trusted else _trust.doubt(use, hidden.device, KERNELS.check)


BACKEND: Backend[AttentionCall] = Backend(
    proof.TRITON,
    device=availability.DEVICE,
    run=KERNELS.run,
    why_not=why_not,
    unavailable=availability.triton_missing,
    unproven=availability.OPT_IN,
    doubt=_doubt,
    training=Training(
        kept=_Kept._fields,
        num_gradients=KERNELS.num_gradients,
        fake=_fake_training,
        run=KERNELS.run_training,
        run_backward=KERNELS.run_backward,
    ),
)
