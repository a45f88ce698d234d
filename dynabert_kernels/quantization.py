"""The int8 form of a sublayer's products, defined in plain PyTorch.

Weights are symmetric: one scale per output of a product, from all rows of the weights, so that
every width reads the same integers. Tokens are symmetric too, quantised as they enter a product,
one scale per token; down products take the neurons in groups of `NEURON_GROUP`, each with a scale
per token. A product of integers is exact; all else (bias, softmax, activation, residual,
LayerNorm) is float32. Integers round half to even.

The products that read the residual stream (query, key, value and up) quantise it *spread*. A few of
its channels are many times as large as the others and would set the scale of every token; sums and
differences of channels (`spread`, a Hadamard transform) carry each of them in small parts. The
weights are spread the same way before they are quantised, and the product is the same: the
transform is its own inverse but for a factor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127
"""The largest magnitude of a quantised number; -128 is not used."""

NEURON_GROUP = 384
"""Neurons that share a token's scale in the down product: the block that a kernel keeps in cache
between the two products of a feed-forward sublayer."""


SPREAD = 256
"""The longest block of channels that `spread` mixes: what a kernel holds in registers."""

SPREAD_STRIDE = 16
"""Channels this far apart, and multiples of it, are mixed: kernels add whole vectors."""

_EXACT_SUM = 1024
"""Products of two quantised numbers that float32 adds up exactly: 1024 * 127**2 < 2**24."""


class QuantizedWeight(NamedTuple):
    """A weight as integers and scales.

    Attributes:
        values: Whole numbers from -127 to 127, float32, shape of the weight.
        scales: What one unit stands for, float32: one per row for `quantize_rows`, one per
            channel for `quantize_channels`.
    """

    values: Tensor
    scales: Tensor


def spread(numbers: Tensor) -> Tensor:
    """Mix channels by a Hadamard transform, so that a large one is carried by many small numbers.

    Channels are mixed with those 16, 32, 48, .. apart in the same block. A block is as long as the
    largest power of two that divides C, at most `SPREAD`; where that is below 32, nothing is mixed.
    Twice the transform is ``spread_factor(C)`` times the numbers. Source of the idea: Ashkboos et
    al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024.

    Args:
        numbers: ``[..., C]``, float32.

    Returns:
        ``[..., C]``, float32; kernels add the same numbers in the same order.
    """
    channels, stride = numbers.shape[-1], SPREAD_STRIDE
    while stride < SPREAD and channels % (2 * stride) == 0:
        first, second = numbers.unflatten(-1, (-1, 2, stride)).unbind(-2)
        numbers = torch.stack((first + second, first - second), -2).flatten(-3)
        stride *= 2
    return numbers


def spread_factor(channels: int) -> int:
    """How many channels `spread` adds up in each of its numbers; 1 if it changes nothing."""
    return max(1, math.gcd(channels, SPREAD) // SPREAD_STRIDE)


def quantize_rows(name: str, weight: Tensor) -> QuantizedWeight:
    """Quantise ``[..., C]``, spread, with one scale for each row of C numbers.

    Args:
        name: What the weight is called, for the message.
        weight: The weight. Its product with a token is that of the result with `spread` of it.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    check_finite(name, weight)
    spread_weight = spread(weight.float()) / spread_factor(weight.shape[-1])
    return _quantize(spread_weight, (weight.dim() - 1,))


def quantize_channels(name: str, weight: Tensor) -> QuantizedWeight:
    """Quantise ``[..., C]`` as it is, with one scale for each of the C channels.

    Args:
        name: What the weight is called, for the message.
        weight: The weight.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    check_finite(name, weight)
    return _quantize(weight.float(), tuple(range(weight.dim() - 1)))


def _quantize(weight: Tensor, reduced: tuple[int, ...]) -> QuantizedWeight:
    scales = weight.abs().amax(reduced, keepdim=True) / LARGEST
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (weight / scales).round().clamp(-LARGEST, LARGEST)
    return QuantizedWeight(values, scales.squeeze(reduced))


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight that has no int8 form; while tracing, values are not looked at.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    if torch.compiler.is_compiling() or bool(weight.isfinite().all()):
        return
    raise ValueError(
        f"quantization: {name} holds NaN or infinity, expected finite numbers. "
        "Look for the training step that diverged, or use the weights unquantised."
    )


def integer_product(tokens: Tensor, values: Tensor) -> Tensor:
    """Quantise tokens and multiply them, ``[T, K]`` by ``[K, N]`` integers.

    Args:
        tokens: ``[T, K]``, float32.
        values: The integers of a weight, ``[K, N]``, float32.

    Returns:
        ``[T, N]``, float32, still to be multiplied by the scales of the weight.
    """
    largest = tokens.abs().amax(1, keepdim=True)
    # The reciprocal of a subnormal number overflows; a finite one keeps integers small.
    inverse = (LARGEST / largest).clamp(max=torch.finfo(torch.float32).max)
    inverse = torch.where(largest == 0, torch.zeros_like(inverse), inverse)
    integers = (tokens * inverse).round()
    parts = zip(integers.split(_EXACT_SUM, 1), values.split(_EXACT_SUM), strict=True)
    products = [part @ rows for part, rows in parts]
    exact = products[0] if len(products) == 1 else torch.stack(products).double().sum(0).float()
    return exact * (largest / LARGEST)
