"""The attention sublayer on CUDA C++ kernels; see csrc/attention/attention_cuda.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynabert_kernels import _cuda_extension, proof
from dynabert_kernels.ops import _cuda, _trust
from dynabert_kernels.ops._op import Backend
from dynabert_kernels.ops._sublayer import token_dtype
from dynabert_kernels.ops.attention._arguments import Arguments, call_of

if TYPE_CHECKING:
    from dynabert_kernels.ops.attention import AttentionCall


def _scope(call: AttentionCall) -> str | None:
    return _cuda.scope(call.hidden, dropout=call.dropout_p > 0 or call.attention_dropout_p > 0)


def why_not(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    if weights.head_dim not in _cuda_extension.HEAD_DIMS:
        allowed = ", ".join(map(str, _cuda_extension.HEAD_DIMS))
        return f"head_dim={weights.head_dim}, expected one of {allowed}"
    return _cuda.why_not(
        call.hidden,
        (weights.qkv_weight, weights.out_weight),
        (weights.qkv_bias, weights.out_bias, weights.norm_weight, weights.norm_bias),
        compute=token_dtype(call.compute),
        quantization=weights.quantization,
    )


def _forward(*arguments: Any) -> Tensor:
    call = Arguments(*arguments)
    hidden, dtype = _cuda.aligned_rows(call.hidden), token_dtype(call.compute)
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    tokens, hidden_size = hidden.shape
    if tokens == 0:
        return out
    module, limit = _cuda_extension.cuda_extension(), call.num_heads
    width = _cuda.Width.of(limit, call.num_heads_each, hidden.device)
    cu_seqlens = call.cu_seqlens.contiguous()
    with torch.cuda.device_of(hidden):
        device, stream = _cuda.place_of(hidden)
        x = hidden if hidden.dtype == dtype else hidden.to(dtype)
        qkv_weight = _cuda.operand(call.qkv_weight, dtype, limit)
        qkv_bias = _cuda.operand(call.qkv_bias, dtype, limit)
        out_weight = _cuda.operand(call.out_weight, dtype, limit)
        out_bias = _cuda.operand(call.out_bias, dtype)
        norm_weight, norm_bias = _cuda.norm_vectors(call.norm_weight, call.norm_bias)
        sizes = (
            _cuda.ELEMENT_TYPES[dtype],
            _cuda.ELEMENT_TYPES[hidden.dtype],
            _cuda.ELEMENT_TYPES[norm_weight.dtype],
            tokens,
            hidden_size,
            min(qkv_weight.shape[0], out_weight.shape[0]),
            limit,
            width.num_each,
            cu_seqlens.shape[0] - 1,
            qkv_weight.shape[2],
            call.max_seqlen,
        )
        num_bytes = module.attention_workspace_bytes(device, *sizes)
        workspace, _memory = _cuda.scratch(num_bytes, hidden)
        module.attention(
            device,
            stream,
            *sizes,
            x.data_ptr(),
            hidden.data_ptr(),
            qkv_weight.data_ptr(),
            qkv_bias.data_ptr(),
            out_weight.data_ptr(),
            out_bias.data_ptr(),
            norm_weight.data_ptr(),
            norm_bias.data_ptr(),
            call.norm_eps,
            out.data_ptr(),
            x.stride(0),
            hidden.stride(0),
            _cuda.address(width.each),
            cu_seqlens.data_ptr(),
            workspace,
            _cuda.norm_workspace(hidden, norm_weight, dtype, width),
        )
    return out


KERNELS = _trust.Kernels(
    proof.CUDA, "attention", has_heads=True, forward=_forward, call_of=call_of, num_gradients=7
)


def _doubt(call: AttentionCall, trains: bool) -> str | None:
    hidden = call.hidden
    head_dim = call.weights.qkv_weight.size(2)
    use = (proof.CUDA, "attention", call.compute, head_dim, trains, hidden.get_device())
    return None if use in _trust.trusted else _trust.doubt(use, hidden.device, KERNELS.check)


BACKEND: Backend[AttentionCall] = Backend(
    proof.CUDA,
    device=_cuda.DEVICE,
    run=KERNELS.run,
    scope=_scope,
    why_not=why_not,
    unavailable=_cuda.cuda_missing,
    unproven=_cuda_extension.OPT_IN,
    yields=lambda call: _cuda.yields(call.hidden, call.compute, call.num_heads_each),
    doubt=_doubt,
)
