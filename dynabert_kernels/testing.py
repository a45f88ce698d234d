"""What the tests of every backend share: inputs, float64 truth, and the tolerance.

The tolerance needs no tuning: against float64, a result may be at most twice as wrong as plain
PyTorch is in the same dtype, plus one unit of the dtype's last place. Both the largest and the
root-mean-square error count: the second is what catches a small error that is everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynabert_kernels.layout import PackedAttention, PackedFFN

WeightsT = TypeVar("WeightsT", PackedAttention, PackedFFN)

_INELASTIC = ("out_bias", "down_bias", "norm_weight", "norm_bias")


def random_attention(
    num_heads: int,
    head_dim: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PackedAttention:
    """Random attention weights at a trained model's scale: outputs of the projections near 1."""
    draw = _normal(seed, dtype, device)
    scale = hidden_size**-0.5
    return PackedAttention(
        draw(num_heads, 3, head_dim, hidden_size, scale=1.5 * scale),
        draw(num_heads, 3, head_dim, scale=0.5),
        draw(num_heads, head_dim, hidden_size, scale=(num_heads * head_dim) ** -0.5),
        draw(hidden_size, scale=0.5),
        draw(hidden_size, scale=0.1) + 1,
        draw(hidden_size, scale=0.1),
    )


def random_ffn(
    intermediate_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    activation: str = "gelu",
) -> PackedFFN:
    """Random feed-forward weights at a trained model's scale: outputs of the projections near 1."""
    draw = _normal(seed, dtype, device)
    return PackedFFN(
        draw(intermediate_size, hidden_size, scale=hidden_size**-0.5),
        draw(intermediate_size, scale=0.5),
        draw(intermediate_size, hidden_size, scale=2 * intermediate_size**-0.5),
        draw(hidden_size, scale=0.5),
        draw(hidden_size, scale=0.1) + 1,
        draw(hidden_size, scale=0.1),
        activation=activation,
    )


def random_hidden(
    total_tokens: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Random tokens, ``[total_tokens, hidden_size]``."""
    return _normal(seed, dtype, device)(total_tokens, hidden_size, scale=1.0)


def _normal(seed: int, dtype: torch.dtype, device: torch.device | str) -> Callable[..., Tensor]:
    # Drawn on the CPU in float32, so that every device and dtype gets the same numbers.
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return (numbers * scale).to(device, dtype)

    return draw


def random_lengths(
    batch_size: int, max_seqlen: int, *, seed: int = 0, shortest: int = 1
) -> list[int]:
    """Lengths from `shortest` to `max_seqlen`, the longest among them."""
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, max_seqlen) for _ in range(batch_size)]
    if lengths:
        lengths[draw.randrange(batch_size)] = max_seqlen
    return lengths


def converted(
    weights: WeightsT,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
    requires_grad: bool = False,
) -> WeightsT:
    """A detached copy of packed weights in another dtype or on another device."""
    changes: dict[str, Any] = {
        name: tensor.detach()
        .to(device=device, dtype=dtype, copy=True)
        .requires_grad_(requires_grad)
        for name, tensor in tensors_of(weights).items()
    }
    return replace(weights, **changes)


def tensors_of(weights: PackedAttention | PackedFFN) -> dict[str, Tensor]:
    """The tensors of packed weights by field name."""
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def nan_tails(weights: WeightsT, width: int) -> WeightsT:
    """A copy with NaN in every head or neuron beyond the first `width`."""
    copy = converted(weights)
    for name, tensor in tensors_of(copy).items():
        if name not in _INELASTIC:
            tensor[width:] = torch.nan
    return copy


def extracted(weights: WeightsT, width: int) -> WeightsT:
    """The sublayer of the first `width` heads or neurons, as tensors of their own."""
    return converted(weights.prefix(width))


def assert_as_accurate(
    name: str, actual: Tensor, plain: Tensor, truth: Tensor, *, factor: float = 2.0
) -> None:
    """Check a result against float64, by the error plain PyTorch makes in the same dtype.

    Args:
        name: What is compared, for the message.
        actual: The result to judge.
        plain: Plain PyTorch's result in the dtype of `actual`.
        truth: The float64 result.
        factor: How many times plain PyTorch's error is allowed.

    Raises:
        AssertionError: The result is too wrong, is not a number where the truth is one, or
            differs in shape or dtype.
    """
    if actual.shape != truth.shape or plain.shape != truth.shape:
        raise AssertionError(
            f"{name}: shapes {list(actual.shape)} and {list(plain.shape)} (plain), expected "
            f"{list(truth.shape)}"
        )
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {plain.dtype}")
    if truth.numel() == 0:
        return
    truth = truth.detach().cpu().double()
    wide, plain_wide = (t.detach().cpu().double() for t in (actual, plain))
    special = ~truth.isfinite()
    if not torch.equal(wide.isfinite(), ~special) or not torch.equal(
        wide[special].nan_to_num(), truth[special].nan_to_num()
    ):
        count = int((wide.isfinite() == special).sum())
        raise AssertionError(f"{name}: NaN or infinity differs from the truth in {count} places")
    error, allowed = (wide - truth)[~special], (plain_wide - truth)[~special]
    step = torch.finfo(actual.dtype).eps
    expected = truth[~special]
    # Rounding is wrong by one unit at most, and by 12**-0.5 units in the root mean square.
    for measure, reduce, floor in (
        ("largest", _largest, step),
        ("root-mean-square", _root_mean_square, step * 12**-0.5),
    ):
        got = reduce(error)
        limit = factor * reduce(allowed) + floor * reduce(expected)
        if not got <= limit:
            raise AssertionError(
                f"{name}: {measure} error {got:.3e}, expected at most {limit:.3e} "
                f"({factor:g} x {reduce(allowed):.3e} of plain PyTorch, "
                f"+ {floor:.1e} x {reduce(expected):.3e})"
            )


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0
