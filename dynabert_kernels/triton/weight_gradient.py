"""Launcher of the gradient of an elastic weight; see `weight_gradient_kernel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dynabert_kernels.triton import launch
from dynabert_kernels.triton.dispatch import cdiv, descriptor, next_power_of_2, start
from dynabert_kernels.triton.row_tiles import RowTiles
from dynabert_kernels.triton.weight_gradient_kernel import (
    add_partial_blocks_kernel,
    plan_steps_kernel,
    weight_gradient_kernel,
)

_PLAN_CHUNK = 256


@dataclass(frozen=True)
class WeightGradientConfig:
    """How a weight gradient is cut up; see `weight_gradient_kernel`.

    Attributes:
        block_t: Tokens of a step.
        block_n: Rows of a tile of the gradient.
        block_c: Channels of a tile.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        programs: Programs for each multiprocessor: as many as fit, all running at once.
        descriptors: Loads by the copy engine of sm_90.
    """

    block_t: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    programs: int = 2
    descriptors: bool = False


def _is_aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0


def choose_config(rows: Tensor, inputs: Tensor) -> WeightGradientConfig:
    """The configuration for one gradient."""
    capability, _ = launch.card(rows.device)
    aligned = _is_aligned(rows) and _is_aligned(inputs) and inputs.shape[1] % 8 == 0
    if rows.dtype == torch.float32:
        return WeightGradientConfig(32 if aligned else 16, 64, 64, 8, 2)
    if not aligned:
        return WeightGradientConfig(32, 64, 64, 8, 2)
    if capability == 90:
        # H200, 16384 tokens, 768 channels, bfloat16, 3072, 2304 and 768 rows, without bias: 115, 94
        # and 40 us (cuBLAS 104, 87 and 37); three stages and two programs 123, 98 and 43;
        # 128 x 256 tiles 121, 97 and 44; 256 x 128 tiles 120, 96 and 43.
        return WeightGradientConfig(64, 128, 128, 8, 5, programs=1, descriptors=True)
    return WeightGradientConfig(32, 128, 64, 8, 3)


def weight_gradient(
    rows: Tensor,
    inputs: Tensor,
    *,
    width: int | RowTiles,
    unit: int = 1,
    limit: int,
    dtype: torch.dtype,
    with_bias: bool,
    config: WeightGradientConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of ``rows[t, n] * inputs[t, c]`` over the tokens whose width reaches row n.

    Args:
        rows: Gradient of the elastic outputs, or elastic activations: ``[T, width * unit]`` for an
            int, ``[T, limit * unit]`` for tiles; rows any distance apart.
        inputs: ``[T, C]``, rows any distance apart, dtype of `rows`.
        width: Heads or neurons: of all tokens, or of each tile.
        unit: Rows of the gradient for each head or neuron.
        limit: Heads or neurons of the weight.
        dtype: Of the gradient.
        with_bias: Whether to sum `rows` over the tokens too.
        config: Overrides the table.

    Returns:
        ``[limit * unit, C]``, zero where no token reaches; and the sums, float32
        ``[limit * unit]``, or None.
    """
    rows, inputs = launch.with_contiguous_rows(rows), launch.with_contiguous_rows(inputs)
    tokens, channels = inputs.shape
    num_rows, out_rows = rows.shape[1], limit * unit
    assert rows.dtype == inputs.dtype and len(rows) == tokens
    assert num_rows == (width * unit if isinstance(width, int) else out_rows)
    device = rows.device
    out = torch.empty(out_rows, channels, dtype=dtype, device=device)
    sums = torch.empty(out_rows, dtype=torch.float32, device=device) if with_bias else None
    if out.numel() == 0:
        return out, sums
    if tokens == 0 or num_rows == 0:
        return out.zero_(), None if sums is None else sums.zero_()
    if config is None:
        config = choose_config(rows, inputs)

    num_blocks_n = cdiv(out_rows, config.block_n)
    blocks_c = cdiv(channels, config.block_c)
    plan_blocks = next_power_of_2(num_blocks_n)
    blocks = cdiv(num_rows, config.block_n)
    ragged = isinstance(width, RowTiles)
    steps_list = counts = None
    num_steps = cdiv(tokens, config.block_t)
    if isinstance(width, RowTiles):
        steps_of_tile = cdiv(width.block_m, config.block_t)
        num_steps = len(width.table) * steps_of_tile
        steps_list = torch.empty(2, num_steps, 3, dtype=torch.int32, device=device)
        counts = torch.empty(plan_blocks + 1, 4, dtype=torch.int32, device=device)
        start(
            plan_steps_kernel,
            (1,),
            width.table,
            steps_list,
            counts,
            len(width.table),
            unit,
            num_steps,
            out_rows,
            STEPS_OF_TILE=steps_of_tile,
            BLOCK_T=config.block_t,
            BLOCK_N=config.block_n,
            NUM_BLOCKS_N=plan_blocks,
            CHUNK=_PLAN_CHUNK,
            num_warps=8,
        )
    _, num_sms = launch.card(device)
    num_shares = min(max(1, num_sms * config.programs // blocks_c), num_steps * blocks)
    num_slots = num_shares + num_blocks_n
    partial = torch.empty(num_slots, config.block_n, channels, dtype=torch.float32, device=device)
    bias_partial = (
        torch.empty(num_slots, blocks_c, config.block_n, dtype=torch.float32, device=device)
        if with_bias
        else None
    )
    descriptors: list[TensorDescriptor | None] = [None] * 4
    if config.descriptors:
        tile = [config.block_n, config.block_c]
        descriptors = [
            descriptor(rows, [config.block_t, config.block_n]),
            descriptor(inputs, [config.block_t, config.block_c]),
            descriptor(out, tile),
            descriptor(partial.view(-1, channels), tile),
        ]
    start(
        weight_gradient_kernel,
        (num_shares * blocks_c,),
        *descriptors,
        rows,
        inputs,
        out,
        partial,
        bias_partial,
        steps_list,
        counts,
        tokens,
        num_rows,
        channels,
        out_rows,
        rows.stride(0),
        inputs.stride(0),
        num_steps,
        blocks,
        num_steps,
        num_shares,
        RAGGED=ragged,
        HAS_BIAS=with_bias,
        DESCRIPTORS=config.descriptors,
        INPUT_PRECISION=launch.input_precision(rows.dtype),
        BLOCK_T=config.block_t,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        NUM_BLOCKS_N=plan_blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    tile_n, tile_c = 16, 128
    start(
        add_partial_blocks_kernel,
        (cdiv(out_rows, tile_n), cdiv(channels, tile_c)),
        out,
        sums,
        partial,
        bias_partial,
        counts,
        channels,
        out_rows,
        num_steps,
        blocks,
        blocks_c,
        num_shares,
        RAGGED=ragged,
        HAS_BIAS=with_bias,
        BLOCK_N=config.block_n,
        NUM_BLOCKS_N=plan_blocks,
        TILE_N=tile_n,
        TILE_C=tile_c,
        num_warps=4,
    )
    return out, sums
