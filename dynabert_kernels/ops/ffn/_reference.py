"""The feed-forward sublayer in plain PyTorch: the truth every other backend is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels.layout import PackedFFN
from dynabert_kernels.ops._checks import check_not_compiling
from dynabert_kernels.ops._sublayer import (
    WidthGroups,
    add_norm,
    hidden_dropout,
    nested_prefixes,
    read_widths,
    token_dtype,
)
from dynabert_kernels.quantization import (
    NEURON_GROUP,
    QuantizedWeight,
    integer_product,
    quantize_channels,
    quantize_rows,
    spread,
)

if TYPE_CHECKING:
    from dynabert_kernels.ops.ffn import FFNCall


def ffn(call: FFNCall) -> Tensor:
    """Run one call; see `dynabert_kernels.ops.ffn.ffn`."""
    if call.compute == "int8":
        with torch.autocast(call.hidden.device.type, enabled=False):
            return _sublayer(call)
    return _sublayer(call)


def _sublayer(call: FFNCall) -> Tensor:
    weights, hidden = call.weights, call.hidden
    widths: list[int] = []
    offsets: list[int] = []
    total_tokens = hidden.shape[0]
    if call.intermediate_sizes is not None and total_tokens > 0:
        assert call.cu_seqlens is not None
        sizes, limit = call.intermediate_sizes, weights.intermediate_size
        widths, offsets = read_widths(
            "ffn", "intermediate_size", sizes, call.cu_seqlens, limit, "neurons"
        )
        if offsets[-1] < total_tokens:
            hidden = hidden[: offsets[-1]]
    inputs = hidden.to(token_dtype(call.compute))
    if widths and hidden.shape[0] > 0:
        projected = _project_by_width(call, inputs, widths, offsets)
    elif call.compute == "int8":
        projected = Int8FFN.of(weights).prefix(call.intermediate_size).project(inputs)
    else:
        projected = _project(inputs, weights.prefix(call.intermediate_size))
    dropped = hidden_dropout(projected, call.dropout_p, call.seed)
    result = add_norm(dropped, hidden, weights.norm_weight, weights.norm_bias, weights.norm_eps)
    if hidden is call.hidden:
        return result
    return F.pad(result, (0, 0, 0, total_tokens - hidden.shape[0]))


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


class Int8FFN(NamedTuple):
    """The products of a sublayer in integers, as `dynabert_kernels.quantization` defines them."""

    up: QuantizedWeight
    up_bias: Tensor
    down: QuantizedWeight
    down_bias: Tensor
    activation: str

    @classmethod
    def of(cls, weights: PackedFFN) -> Int8FFN:
        """Quantise all neurons, so that every width has the same integers and scales.

        Raises:
            ValueError: A weight is not finite.
        """
        return cls(
            quantize_rows("up_weight", weights.up_weight),
            weights.up_bias.float(),
            quantize_channels("down_weight", weights.down_weight),
            weights.down_bias.float(),
            weights.activation,
        )

    def prefix(self, intermediate_size: int) -> Int8FFN:
        """The first neurons, with the scales of all."""
        up, down = self.up, self.down
        return self._replace(
            up=QuantizedWeight(up.values[:intermediate_size], up.scales[:intermediate_size]),
            up_bias=self.up_bias[:intermediate_size],
            down=QuantizedWeight(down.values[:intermediate_size], down.scales),
        )

    def project(self, inputs: Tensor) -> Tensor:
        """Up, activation, down: ``[n, C]`` to ``[n, C]``, float32."""
        up = integer_product(spread(inputs), self.up.values.t()) * self.up.scales + self.up_bias
        active = _activate(up, self.activation)
        total = torch.zeros_like(inputs)
        for start in range(0, active.shape[1], NEURON_GROUP):
            group = slice(start, start + NEURON_GROUP)
            total = total + integer_product(active[:, group], self.down.values[group])
        return total * self.down.scales + self.down_bias


def _project_by_width(
    call: FFNCall, inputs: Tensor, widths: list[int], offsets: list[int]
) -> Tensor:
    check_not_compiling("ffn", "intermediate_size")  # Dynamo also starts at this frame, on its own
    by_width = WidthGroups(widths, offsets, inputs.device)
    parts = list(zip(by_width.groups, by_width.split(inputs), strict=True))
    if call.compute == "int8":
        quantized = Int8FFN.of(call.weights)
        return by_width.merge([quantized.prefix(group.width).project(p) for group, p in parts])
    prefixes = nested_prefixes(call.weights, widths, inputs.dtype)
    return by_width.merge([_project(part, prefixes[group.width]) for group, part in parts])
