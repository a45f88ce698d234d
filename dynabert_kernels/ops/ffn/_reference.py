"""The feed-forward sublayer in plain PyTorch: the truth every other backend is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels.layout import PackedFFN
from dynabert_kernels.ops._checks import check_not_compiling, check_width_values
from dynabert_kernels.ops._sublayer import (
    add_norm,
    compute_dtype,
    hidden_dropout,
    nested_prefixes,
    run_by_width,
)

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def ffn(call: FFNCall) -> Tensor:
    """Run one call; see `dynabert_kernels.ops.ffn.ffn`."""
    if call.intermediate_sizes is not None and call.hidden.shape[0] > 0:
        return _ffn_by_width(call)
    weights = call.weights.prefix(call.intermediate_size)
    tokens = slice(0, call.hidden.shape[0])
    return _sublayer(call.hidden, weights, call.dropout_p, call.seed, tokens)


def _sublayer(
    hidden: Tensor,
    weights: PackedFFN,
    dropout_p: float,
    seed: int | None,
    tokens: Tensor | slice,
) -> Tensor:
    dtype = compute_dtype(hidden)
    up = F.linear(hidden.to(dtype), weights.up_weight.to(dtype), weights.up_bias.to(dtype))
    active = _activate(up, weights.activation)
    down = torch.addmm(weights.down_bias.to(dtype), active, weights.down_weight.to(dtype))
    dropped = hidden_dropout(down, dropout_p, seed, tokens)
    return add_norm(dropped, hidden, weights.norm_weight, weights.norm_bias, weights.norm_eps)


def _activate(up: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(up)
    return F.gelu(up, approximate="tanh" if activation == "gelu_tanh" else "none")


def _ffn_by_width(call: FFNCall) -> Tensor:
    check_not_compiling("ffn", "intermediate_size")
    assert call.intermediate_sizes is not None and call.cu_seqlens is not None
    widths = call.intermediate_sizes.tolist()
    check_width_values(
        "ffn", "intermediate_size", widths, call.weights.intermediate_size, "neurons"
    )
    prefixes = nested_prefixes(call.weights, widths)

    def run(width: int, hidden: Tensor, rows: list[int], tokens: Tensor | slice) -> Tensor:
        return _sublayer(hidden, prefixes[width], call.dropout_p, call.seed, tokens)

    return run_by_width(call.hidden, widths, call.cu_seqlens.tolist(), run)
