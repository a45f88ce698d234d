"""What the reference implementations of both sublayers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels import dropout
from dynabert_kernels.ops._checks import check_not_compiling, check_width_values
from dynabert_kernels.varlen import token_positions


class _Elastic(Protocol):
    def prefix(self: WeightsT, width: int, /) -> WeightsT: ...
    def with_elastic(self: WeightsT, tensors: Sequence[Tensor], /) -> WeightsT: ...
    def elastic(self) -> tuple[Tensor, ...]: ...


WeightsT = TypeVar("WeightsT", bound=_Elastic)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of the tokens."""
    # `is_cpu` is cheaper than the device's name, and every call of an op asks.
    device_type = "cpu" if hidden.is_cpu else hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def compute_name(hidden: Tensor, quantization: str | None) -> str:
    """What an op's argument ``compute`` says: the dtype of the matrix products, by name.

    Quantised weights stay quantised under autocast.
    """
    return _NAMES[compute_dtype(hidden)] if quantization is None else quantization


def token_dtype(compute: str) -> torch.dtype:
    """The dtype in which tokens reach the products; float32 where these quantise them."""
    return torch.float32 if compute == "int8" else _DTYPES[compute]


def hidden_dropout(projected: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    """Dropout of the ragged batch ``[T, C]``."""
    if dropout_p == 0 or seed is None:
        return dropout.unseeded(projected, dropout_p)
    places = torch.arange(projected.shape[0], device=projected.device)
    numbers = dropout.hidden_uniform(seed, places, projected.shape[1])
    return dropout.apply_mask(projected, numbers, dropout_p)


def token_numbers(tokens: Tensor | slice, device: torch.device) -> Tensor:
    """Token positions as an int64 tensor."""
    if isinstance(tokens, slice):
        return torch.arange(tokens.start, tokens.stop, device=device)
    return tokens


def add_norm(
    projected: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """``LayerNorm(projected + residual)`` in float32 (float64 for float64), dtype of `residual`."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(dtype) + projected
    normed = F.layer_norm(total, total.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return normed.to(residual.dtype)


class _NestedPrefixes(torch.autograd.Function):
    """Prefixes of one weight in the dtype of the products: cast once, one gradient for all.

    Slicing and casting for each width would, in the backward pass, fill a tensor of the full size
    with zeros, copy into it and add it up, once per width.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, widths: tuple[int, ...], dtype: torch.dtype) -> Any:
        ctx.shape, ctx.dtype, ctx.widths = weight.shape, weight.dtype, widths
        ctx.set_materialize_grads(False)
        widest = weight[: max(widths)].to(dtype)
        return tuple(widest[:width] for width in widths)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        total: Tensor | None = None
        for width, gradient in sorted(
            zip(ctx.widths, gradients, strict=True), key=lambda pair: pair[0], reverse=True
        ):
            if gradient is None:
                continue
            if total is None:
                total = gradient.new_empty(ctx.shape, dtype=ctx.dtype)
                total[:width].copy_(gradient)
                total[width:].zero_()
            else:
                total[:width].add_(gradient)
        return total, None, None


def nested_prefixes(
    weights: WeightsT, widths: Iterable[int], dtype: torch.dtype
) -> dict[int, WeightsT]:
    """The prefix of each width with its elastic tensors in `dtype`; see `_NestedPrefixes`."""
    order = tuple(sorted(set(widths)))
    by_tensor = [
        _NestedPrefixes.apply(tensor, order, dtype)  # type: ignore[no-untyped-call]
        for tensor in weights.elastic()
    ]
    return {
        width: weights.with_elastic(tensors)
        for width, tensors in zip(order, zip(*by_tensor, strict=True), strict=True)
    }


def read_widths(
    who: str, name: str, widths: Tensor, cu_seqlens: Tensor, limit: int, what: str
) -> tuple[list[int], list[int]]:
    """The width of each sequence and the ragged offsets, read back from their device.

    Args:
        who: Name of the op, for a message.
        name: Name of the argument.
        widths: ``[batch_size]`` or ``[1]``.
        cu_seqlens: ``[batch_size + 1]``.
        limit: What the weights hold.
        what: Heads or neurons.

    Raises:
        NotImplementedError: A tracer is running.
        ValueError: A width is not from 1 to `limit`.
    """
    check_not_compiling(who, name)
    offsets, values = cu_seqlens.tolist(), widths.tolist()
    check_width_values(who, name, values, limit, what)
    return (values * (len(offsets) - 1) if len(values) == 1 else values), offsets


class WidthGroup(NamedTuple):
    """Sequences of a ragged batch that have one width.

    Attributes:
        width: Heads or neurons.
        rows: The numbers of the sequences.
        lengths: Their tokens.
        tokens: The places of these in the whole batch.
    """

    width: int
    rows: list[int]
    lengths: list[int]
    tokens: Tensor | slice


class WidthGroups:
    """A ragged batch taken apart by width, so that no token meets a weight beyond its own prefix.

    Where the sequences of each width are neighbours, groups are views of the batch; else their
    tokens are gathered.

    Args:
        widths: Width of each sequence.
        offsets: Ragged offsets, one more than `widths`.
        device: Where the batch is.
    """

    def __init__(self, widths: list[int], offsets: list[int], device: torch.device) -> None:
        rows_of: dict[int, list[int]] = {}
        for row, width in enumerate(widths):
            if offsets[row + 1] > offsets[row]:
                rows_of.setdefault(width, []).append(row)
        self.groups = [
            WidthGroup(
                width,
                rows,
                [offsets[row + 1] - offsets[row] for row in rows],
                token_positions([(offsets[row], offsets[row + 1]) for row in rows], device),
            )
            for width, rows in rows_of.items()
        ]
        # Dictionaries keep insertion order, so groups of neighbours already follow each other.
        self._are_neighbours = all(isinstance(group.tokens, slice) for group in self.groups)

    def split(self, hidden: Tensor) -> list[Tensor]:
        """The tokens of each group, from ``[T, C]``."""
        if self._are_neighbours:
            sizes = [sum(group.lengths) for group in self.groups]
            return list(hidden.split(sizes))
        return [hidden[group.tokens] for group in self.groups]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """``[T, C]`` from the tokens of each group."""
        merged = torch.cat(list(parts))
        if self._are_neighbours:
            return merged
        order = torch.cat([token_numbers(group.tokens, merged.device) for group in self.groups])
        return torch.empty_like(merged).index_copy(0, order, merged)
