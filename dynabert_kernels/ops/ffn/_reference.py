"""The feed-forward sublayer in plain PyTorch: the truth every other backend is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels.layout import PackedFFN
from dynabert_kernels.ops._checks import check_not_compiling, check_width_values
from dynabert_kernels.ops._sublayer import (
    WidthGroups,
    add_norm,
    compute_dtype,
    hidden_dropout,
    nested_prefixes,
)

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def ffn(call: FFNCall) -> Tensor:
    """Run one call; see `dynabert_kernels.ops.ffn.ffn`."""
    weights, hidden = call.weights, call.hidden
    inputs = hidden.to(compute_dtype(hidden))
    if call.intermediate_sizes is not None and hidden.shape[0] > 0:
        projected = _project_by_width(call, inputs)
    else:
        projected = _project(inputs, weights.prefix(call.intermediate_size))
    dropped = hidden_dropout(projected, call.dropout_p, call.seed)
    return add_norm(dropped, hidden, weights.norm_weight, weights.norm_bias, weights.norm_eps)


def _project(inputs: Tensor, weights: PackedFFN) -> Tensor:
    """Up, activation, down: ``[n, C]`` to ``[n, C]``, all in the dtype of `inputs`."""
    dtype = inputs.dtype
    up = F.linear(inputs, weights.up_weight.to(dtype), weights.up_bias.to(dtype))
    active = _activate(up, weights.activation)
    return torch.addmm(weights.down_bias.to(dtype), active, weights.down_weight.to(dtype))


def _activate(up: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(up)
    return F.gelu(up, approximate="tanh" if activation == "gelu_tanh" else "none")


def _project_by_width(call: FFNCall, inputs: Tensor) -> Tensor:
    check_not_compiling("ffn", "intermediate_size")
    assert call.intermediate_sizes is not None and call.cu_seqlens is not None
    widths = call.intermediate_sizes.tolist()
    check_width_values(
        "ffn", "intermediate_size", widths, call.weights.intermediate_size, "neurons"
    )
    by_width = WidthGroups(widths, call.cu_seqlens.tolist(), inputs.device)
    prefixes = nested_prefixes(call.weights, widths, inputs.dtype)
    return by_width.merge(
        [
            _project(part, prefixes[group.width])
            for group, part in zip(by_width.groups, by_width.split(inputs), strict=True)
        ]
    )
