"""What both sublayers on Triton kernels share. Imports no Triton before a call runs there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynabert_kernels.triton.launch import Dropout
    from dynabert_kernels.triton.row_tiles import RowTiles


class Width(NamedTuple):
    """How wide the sequences of a call are, as the launchers take it.

    Attributes:
        limit: Heads or neurons that buffers have room for, and no sequence exceeds.
        each: Width of each sequence or of all, on the device; None where `limit` is that of all.
        rows: `limit`, or the tiles of a batch whose widths the device knows.
        num_tokens: Where `each` is given, the number of real tokens, on the device.
    """

    limit: int
    each: Tensor | None
    rows: int | RowTiles
    num_tokens: Tensor | None

    @classmethod
    def of(
        cls, limit: int, each: Tensor | None, cu_seqlens: Tensor | None, total_tokens: int
    ) -> Width:
        """The width of a call; `cu_seqlens` is contiguous, and given where `each` is."""
        if each is None:
            return cls(limit, None, limit, None)
        from dynabert_kernels.triton.shared_tiles import tiles_of

        assert cu_seqlens is not None
        # From pageable memory this still copies before it returns, and waits for no kernel.
        each = each.to(cu_seqlens.device, non_blocking=True).contiguous()
        tiles = tiles_of(cu_seqlens, each, total_tokens, limit)
        return cls(limit, each, tiles, cu_seqlens[-1:])


def draw_seed(seed: int | None, device: torch.device, *, is_used: bool) -> Tensor:
    """The seed of a call's masks, int64 ``[1]``: drawn from torch's generator where it is None.

    Neither way waits for the device, and a captured graph draws anew at every replay.
    """
    if not is_used:
        return torch.empty(1, dtype=torch.int64, device=device)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def dropout_of(dropout_p: float, seed: Tensor) -> Dropout | None:
    """What the launchers take: None where nothing is dropped."""
    from dynabert_kernels.triton.launch import Dropout

    return Dropout(dropout_p, seed) if dropout_p > 0 else None


def matrix_prefix(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first heads or neurons as a matrix ``[n, hidden_size]`` in the dtype of the products.

    Weights of another dtype are cast here, once a call and no further than the widest prefix.
    """
    return weight[:width].to(dtype).view(-1, weight.shape[-1])


def vector_prefix(bias: Tensor, width: int) -> Tensor:
    """The first heads or neurons of a bias, ``[n]``; kernels add it in float32 whatever it is."""
    return bias[:width].reshape(-1).contiguous()


def gradient_of_sum(
    gradient: Tensor, weight: Tensor, width: Width, *, unit: int, through_residual: Tensor
) -> Tensor:
    """Gradient of a sublayer's tokens: back through its first product, and past it.

    Args:
        gradient: Of what the first product gives, ``[T, n]``.
        weight: The first product's prefix, ``[n, C]``.
        width: Of the call.
        unit: Outputs of a head or neuron.
        through_residual: Gradient of what the residual is added to, ``[T, C]``.
    """
    from dynabert_kernels.triton.launch_gemm import columns_product

    result = columns_product(
        gradient, weight, width=width.rows, unit=unit, bias=None, residual=through_residual
    )
    if result.dim() == 2:
        return result
    return (result.sum(0) + through_residual).to(through_residual.dtype)  # partial sums
