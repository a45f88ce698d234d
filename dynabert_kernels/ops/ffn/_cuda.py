"""The feed-forward sublayer on CUDA C++ kernels; see csrc/ffn/ffn_cuda.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynabert_kernels import _cuda_extension, proof
from dynabert_kernels.ops import _cuda, _trust
from dynabert_kernels.ops._op import Backend
from dynabert_kernels.ops._sublayer import token_dtype
from dynabert_kernels.ops.ffn._arguments import Arguments, call_of

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def _scope(call: FFNCall) -> str | None:
    return _cuda.scope(call.hidden, dropout=call.dropout_p > 0)


def why_not(call: FFNCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    weights = call.weights
    return _cuda.why_not(
        call.hidden,
        (weights.up_weight, weights.down_weight),
        (weights.up_bias, weights.down_bias, weights.norm_weight, weights.norm_bias),
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
    module, limit = _cuda_extension.cuda_extension(), call.intermediate_size
    width = _cuda.Width.of(limit, call.intermediate_sizes, hidden.device)
    cu_seqlens = None
    if width.num_each > 1:
        assert call.cu_seqlens is not None
        cu_seqlens = call.cu_seqlens.contiguous()
    with torch.cuda.device_of(hidden):
        device, stream = _cuda.place_of(hidden)
        x = hidden if hidden.dtype == dtype else hidden.to(dtype)
        up_weight = _cuda.operand(call.up_weight, dtype, limit)
        up_bias = _cuda.operand(call.up_bias, dtype, limit)
        down_weight = _cuda.operand(call.down_weight, dtype, limit)
        down_bias = _cuda.operand(call.down_bias, dtype)
        norm_weight, norm_bias = _cuda.norm_vectors(call.norm_weight, call.norm_bias)
        sizes = (
            _cuda.ELEMENT_TYPES[dtype],
            _cuda.ELEMENT_TYPES[hidden.dtype],
            _cuda.ELEMENT_TYPES[norm_weight.dtype],
            tokens,
            hidden_size,
            min(up_weight.shape[0], down_weight.shape[0]),
            limit,
            width.num_each,
            0 if cu_seqlens is None else width.num_each,
        )
        workspace, _memory = _cuda.scratch(module.ffn_workspace_bytes(device, *sizes), hidden)
        module.ffn(
            device,
            stream,
            *sizes,
            _cuda.ACTIVATIONS[call.activation],
            x.data_ptr(),
            hidden.data_ptr(),
            up_weight.data_ptr(),
            up_bias.data_ptr(),
            down_weight.data_ptr(),
            down_bias.data_ptr(),
            norm_weight.data_ptr(),
            norm_bias.data_ptr(),
            call.norm_eps,
            out.data_ptr(),
            x.stride(0),
            hidden.stride(0),
            _cuda.address(width.each),
            _cuda.address(cu_seqlens),
            workspace,
            _cuda.norm_workspace(hidden, norm_weight, dtype, width),
        )
    return out


KERNELS = _trust.Kernels(
    proof.CUDA, "ffn", has_heads=False, forward=_forward, call_of=call_of, num_gradients=7
)


def _doubt(call: FFNCall, trains: bool) -> str | None:
    hidden = call.hidden
    use = (proof.CUDA, "ffn", call.compute, None, trains, hidden.get_device())
    return None if use in _trust.trusted else _trust.doubt(use, hidden.device, KERNELS.check)


BACKEND: Backend[FFNCall] = Backend(
    proof.CUDA,
    device=_cuda.DEVICE,
    run=KERNELS.run,
    scope=_scope,
    why_not=why_not,
    unavailable=_cuda.cuda_missing,
    unproven=_cuda_extension.OPT_IN,
    yields=lambda call: _cuda.yields(call.hidden, call.compute, call.intermediate_sizes),
    doubt=_doubt,
)
