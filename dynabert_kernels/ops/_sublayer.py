"""What the reference implementations of both sublayers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynabert_kernels import dropout
from dynabert_kernels.varlen import token_positions


class _Elastic(Protocol):
    def prefix(self: WeightsT, width: int, /) -> WeightsT: ...


WeightsT = TypeVar("WeightsT", bound=_Elastic)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of the tokens."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def hidden_dropout(
    projected: Tensor, dropout_p: float, seed: int | None, tokens: Tensor | slice
) -> Tensor:
    """Dropout of ``[n, C]``; `tokens` are the places of these rows in the whole ragged batch."""
    if dropout_p == 0:
        return projected
    if seed is None:
        return F.dropout(projected, dropout_p)
    places = token_numbers(tokens, projected.device)
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


def nested_prefixes(weights: WeightsT, widths: Iterable[int]) -> dict[int, WeightsT]:
    """The prefix of each width, each a view of the next wider one.

    Nesting lets autograd add the gradients of narrow prefixes into the next wider one, instead
    of building one full-size tensor of zeros per width.
    """
    prefixes: dict[int, WeightsT] = {}
    for width in sorted(set(widths), reverse=True):
        weights = weights.prefix(width)
        prefixes[width] = weights
    return prefixes


def run_by_width(
    hidden: Tensor,
    widths: list[int],
    offsets: list[int],
    run: Callable[[int, Tensor, list[int], Tensor | slice], Tensor],
) -> Tensor:
    """Run the sequences of each width together, and return all tokens in their old order.

    No token meets a weight beyond its own prefix. Where the sequences of each width are
    neighbours, groups are views of `hidden`; else their tokens are gathered.

    Args:
        hidden: Tokens, ``[T, C]``.
        widths: Width of each sequence.
        offsets: Ragged offsets, one more than `widths`.
        run: Called with the width, tokens ``[n, C]``, the sequence numbers, and the places of
            the tokens in the whole batch.
    """
    rows_of: dict[int, list[int]] = {}
    for row, width in enumerate(widths):
        if offsets[row + 1] > offsets[row]:
            rows_of.setdefault(width, []).append(row)
    groups = [
        (width, rows, token_positions([(offsets[r], offsets[r + 1]) for r in rows], hidden.device))
        for width, rows in rows_of.items()
    ]
    if all(isinstance(tokens, slice) for _, _, tokens in groups):
        # Dictionaries keep insertion order, so the groups already follow each other.
        parts = hidden.split([_count(tokens) for _, _, tokens in groups])
    else:
        parts = tuple(hidden[tokens] for _, _, tokens in groups)
    outputs = torch.cat(
        [
            run(width, part, rows, tokens)
            for (width, rows, tokens), part in zip(groups, parts, strict=True)
        ]
    )
    if all(isinstance(tokens, slice) for _, _, tokens in groups):
        return outputs
    order = torch.cat([token_numbers(tokens, hidden.device) for _, _, tokens in groups])
    return torch.empty_like(outputs).index_copy(0, order, outputs)


def _count(tokens: Tensor | slice) -> int:
    return int(tokens.stop - tokens.start) if isinstance(tokens, slice) else tokens.shape[0]
