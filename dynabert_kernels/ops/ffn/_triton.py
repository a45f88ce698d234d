"""The feed-forward sublayer on Triton kernels: product with activation, product, row norm.

Letters: T total_tokens, I neurons in use, C hidden_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynabert_kernels import proof
from dynabert_kernels.ops import _triton, _trust
from dynabert_kernels.ops._op import Backend, Training
from dynabert_kernels.ops._sublayer import token_dtype
from dynabert_kernels.ops.ffn._arguments import Arguments, call_of
from dynabert_kernels.triton import availability

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


class _Kept(NamedTuple):
    """What the gradient needs besides the arguments."""

    pre_activation: Tensor  # [T, I]
    total: Tensor  # [T, C], what was normalised
    mask_seed: Tensor  # [1], int64


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    return availability.why_not(
        call.hidden,
        (weights.up_weight, weights.down_weight),
        compute=token_dtype(call.compute),
        quantization=weights.quantization,
    )


def _width(call: Arguments, limit: int) -> _triton.Width:
    """The width of a call, in buffers that hold `limit` neurons."""
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    return _triton.Width.of(limit, call.intermediate_sizes, cu_seqlens, call.hidden.shape[0])


def _inference(*arguments: Any) -> Tensor:
    return _forward(Arguments(*arguments), for_gradient=False)[0]


def _training(*arguments: Any) -> tuple[Tensor, ...]:
    output, kept = _forward(Arguments(*arguments), for_gradient=True)
    assert kept is not None
    return (output, *kept)


def _forward(call: Arguments, *, for_gradient: bool) -> tuple[Tensor, _Kept | None]:
    from dynabert_kernels.triton.launch import with_contiguous_rows
    from dynabert_kernels.triton.launch_gemm import columns_product, rows_product
    from dynabert_kernels.triton.launch_norm import residual_norm

    hidden, down_bias = with_contiguous_rows(call.hidden), call.down_bias.contiguous()
    neurons = call.trained_neurons if for_gradient else call.intermediate_size
    dtype = token_dtype(call.compute)
    with torch.cuda.device_of(hidden):
        width = _width(call, neurons)
        seed = _triton.draw_seed(call.seed, hidden.device, is_used=call.dropout_p > 0)
        dropout = _triton.dropout_of(call.dropout_p, seed)
        product = rows_product(
            hidden.to(dtype),
            _triton.matrix_prefix(call.up_weight, neurons, dtype),
            _triton.vector_prefix(call.up_bias, neurons),
            width=width.rows,
            activation=call.activation,
            keep_before=for_gradient,
        )
        active, before = product if isinstance(product, tuple) else (product, None)
        projected = columns_product(
            active,
            _triton.matrix_prefix(call.down_weight, neurons, dtype),
            width=width.rows,
            bias=down_bias,
            residual=hidden,
            dropout=dropout,
        )
        normed = residual_norm(
            projected,
            down_bias,
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
    assert before is not None
    return normed.out, _Kept(before, normed.total, seed)


def _backward(gradient: Tensor, *others: Any) -> tuple[Tensor, ...]:
    from dynabert_kernels.triton.launch import with_contiguous_rows
    from dynabert_kernels.triton.launch_gemm import rows_gradient
    from dynabert_kernels.triton.launch_norm import norm_gradient
    from dynabert_kernels.triton.weight_gradient import weight_gradient

    number = len(_Kept._fields)
    kept, call = _Kept(*others[:number]), Arguments(*others[number:])
    hidden, neurons = with_contiguous_rows(call.hidden), call.trained_neurons
    dtype, limit = token_dtype(call.compute), call.up_weight.shape[0]
    with torch.cuda.device_of(hidden):
        width = _width(call, neurons)
        norm = norm_gradient(
            with_contiguous_rows(gradient),
            kept.total,
            call.norm_weight.contiguous(),
            call.norm_eps,
            dropout=_triton.dropout_of(call.dropout_p, kept.mask_seed),
            projected_dtype=dtype,
            num_tokens=width.num_tokens,
        )
        up_gradient, active = rows_gradient(
            norm.projected,
            _triton.matrix_prefix(call.down_weight, neurons, dtype),
            kept.pre_activation,
            width=width.rows,
            activation=call.activation,
        )
        down_weight, _ = weight_gradient(
            active,
            norm.projected,
            width=width.rows,
            limit=limit,
            dtype=call.down_weight.dtype,
            with_bias=False,
        )
        up_weight, up_bias = weight_gradient(
            up_gradient,
            hidden.to(dtype),
            width=width.rows,
            limit=limit,
            dtype=call.up_weight.dtype,
            with_bias=True,
        )
        assert up_bias is not None
        hidden_gradient = _triton.gradient_of_sum(
            up_gradient,
            _triton.matrix_prefix(call.up_weight, neurons, dtype),
            width,
            unit=1,
            through_residual=norm.total,
        )
    return (
        hidden_gradient,
        up_weight,
        up_bias.to(call.up_bias.dtype),
        down_weight,
        norm.bias.to(call.down_bias.dtype),
        norm.norm_weight.to(call.norm_weight.dtype),
        norm.norm_bias.to(call.norm_bias.dtype),
    )


def _fake_training(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    hidden, neurons, dtype = call.hidden, call.trained_neurons, token_dtype(call.compute)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        *_Kept(
            hidden.new_empty(hidden.shape[0], neurons, dtype=dtype),
            torch.empty_like(hidden, memory_format=torch.contiguous_format),
            hidden.new_empty(1, dtype=torch.int64),
        ),
    )


KERNELS = _trust.TrainingKernels(
    proof.TRITON,
    "ffn",
    has_heads=False,
    forward=_inference,
    training=_training,
    backward=_backward,
    like_training=_fake_training,
    call_of=call_of,
    num_kept=len(_Kept._fields),
    num_gradients=7,
)


def _doubt(call: FFNCall, trains: bool) -> str | None:
    hidden = call.hidden
    use = (proof.TRITON, "ffn", call.compute, None, trains, hidden.get_device())
    return None if use in _trust.trusted else _trust.doubt(use, hidden.device, KERNELS.check)


BACKEND: Backend[FFNCall] = Backend(
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
