"""Launchers of the products on a weight prefix; see `gemm`.

A width is an int from the host, and then buffers have just that width, or `RowTiles` from the
device: then buffers have room for the widest, rows are as far apart, and what lies beyond a row's
own width, or after the last sequence, is undefined.
"""

import torch
from torch import Tensor

from dynabert_kernels.triton import configs, launch
from dynabert_kernels.triton.configs import Form, LinearConfig
from dynabert_kernels.triton.dispatch import cdiv, descriptor, start
from dynabert_kernels.triton.gemm import product_descriptor_kernel, product_kernel
from dynabert_kernels.triton.launch import Dropout
from dynabert_kernels.triton.row_tiles import RowTiles


def rows_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    width: int | RowTiles,
    unit: int = 1,
    activation: str = "none",
    keep_before: bool = False,
    config: LinearConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``activation(x @ weight[:n].T + bias[:n])``, where n is ``width * unit``.

    Args:
        x: ``[T, K]``, rows any distance apart.
        weight: ``[limit * unit, K]``, contiguous.
        bias: ``[limit * unit]``, contiguous.
        width: Heads or neurons; see the module.
        unit: Rows of the weight for each of them.
        activation: ``none``, ``gelu``, ``gelu_tanh`` or ``relu``.
        keep_before: Whether to return the values before the activation too.
        config: Overrides the table.

    Returns:
        ``[T, n]``, or ``[T, limit * unit]`` with `RowTiles`, in x's dtype; with `keep_before` that
        and another like it.
    """
    weight, outputs = _prefix(weight, width, unit)
    config = config or _choose("rows", x, weight, None, width, keeps_before=keep_before)
    out = x.new_empty(x.shape[0], outputs)
    before = torch.empty_like(out) if keep_before else None
    _launch("rows", x, weight, bias, None, out, before, width, unit, config, activation=activation)
    return out if before is None else (out, before)


def rows_gradient(
    gradient: Tensor,
    weight: Tensor,
    before: Tensor,
    *,
    width: int | RowTiles,
    unit: int = 1,
    activation: str,
    config: LinearConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the values before the activation, and the activated values again.

    Args:
        gradient: Of the product that read the activated values, ``[T, C]``, rows any distance
            apart.
        weight: Of that product, ``[limit * unit, C]``, contiguous.
        before: As `rows_product` returned it.
        width: See `rows_product`; likewise `unit`, `activation` and `config`.

    Returns:
        ``(gradient @ weight[:n].T) * activation'(before)`` and ``activation(before)``, both like
        `before`.
    """
    weight, outputs = _prefix(weight, width, unit)
    assert before.shape == (gradient.shape[0], outputs), before.shape
    config = config or _choose("gradient", gradient, weight, before, width)
    out, activated = torch.empty_like(before), torch.empty_like(before)
    _launch(
        "gradient",
        gradient,
        weight,
        None,
        before,
        out,
        activated,
        width,
        unit,
        config,
        activation=activation,
    )
    return out, activated


def columns_product(
    x: Tensor,
    weight: Tensor,
    *,
    width: int | RowTiles,
    unit: int = 1,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout: Dropout | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """``dropout(x[:, :n] @ weight[:n] + bias) + residual``, where n is ``width * unit``.

    Args:
        x: ``[T, n]``, or ``[T, limit * unit]`` with `RowTiles`, rows any distance apart.
        weight: ``[limit * unit, C]``, contiguous.
        width: See `rows_product`; likewise `unit` and `config`.
        bias: ``[C]``, contiguous.
        residual: ``[T, C]``, rows any distance apart; may be float32 where x is half precision.
        dropout: Tokens are numbered by their rows.

    Returns:
        ``[T, C]`` in residual's dtype, or in x's without one. If the configuration splits K,
        float32 partial sums ``[split_k, T, C]`` of the product alone: bias, dropout and residual
        are then left to `residual_norm`.
    """
    weight, inputs = _prefix(weight, width, unit)
    assert x.shape[1] == inputs, (x.shape, inputs)
    config = config or _choose(
        "columns", x, weight, residual, width, dropout=dropout is not None and dropout.p > 0
    )
    shape = (x.shape[0], weight.shape[1])
    if config.split_k > 1:
        out = x.new_empty(config.split_k, *shape, dtype=torch.float32)
        _launch("columns", x, weight, None, None, out, None, width, unit, config)
        return out
    out = x.new_empty(shape, dtype=None if residual is None else residual.dtype)
    _launch("columns", x, weight, bias, residual, out, None, width, unit, config, dropout=dropout)
    return out


def _prefix(weight: Tensor, width: int | RowTiles, unit: int) -> tuple[Tensor, int]:
    """What a product may read of a weight, and the elastic size of its buffers."""
    assert weight.is_contiguous()
    size = (width.limit if isinstance(width, RowTiles) else width) * unit
    assert size <= weight.shape[0], (size, weight.shape)
    return weight[:size], size


def _choose(
    form: Form,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
    width: int | RowTiles,
    *,
    keeps_before: bool = False,
    dropout: bool = False,
) -> LinearConfig:
    capability, num_sms = launch.card(x.device)
    outputs, inputs = weight.shape if form != "columns" else weight.shape[::-1]
    matrices = (x, weight) if other is None else (x, weight, other)
    return configs.linear_config(
        form,
        tokens=x.shape[0],
        outputs=outputs,
        inputs=inputs,
        dtype=x.dtype,
        capability=capability,
        num_sms=num_sms,
        aligned=outputs % 16 == inputs % 16 == 0 and all(map(launch.is_aligned, matrices)),
        other_dtype=None if other is None else other.dtype,
        keeps_before=keeps_before,
        dropout=dropout,
        block_m=width.block_m if isinstance(width, RowTiles) else None,
        one_width=width.one_width if isinstance(width, RowTiles) else True,
    )


def _launch(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    out: Tensor,
    second: Tensor | None,
    width: int | RowTiles,
    unit: int,
    config: LinearConfig,
    *,
    activation: str = "none",
    dropout: Dropout | None = None,
) -> None:
    tokens = x.shape[0]
    outputs, inputs = weight.shape if form != "columns" else weight.shape[::-1]
    # The other epilogues need whole sums.
    assert config.split_k == 1 or form == "columns", (form, config)
    assert x.stride(1) == 1 and (form == "columns" or x.shape[1] == inputs)
    tiles = width if isinstance(width, RowTiles) else None
    if tiles is not None:
        assert config.block_m == tiles.block_m, (config, tiles.block_m)
        num_row_blocks = tiles.table.shape[0]
    else:
        num_row_blocks = cdiv(tokens, config.block_m)
    num_tiles = num_row_blocks * cdiv(outputs, config.block_n)
    if num_tiles == 0:
        return
    dropout_p = 0.0 if dropout is None else dropout.p
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    seed = None if dropout_p == 0 or dropout is None else dropout.seed
    table = None if tiles is None else tiles.table
    # Of the widths in a table only this is known: they are multiples of unit.
    step = config.block_k
    ends_with_step = inputs % step == 0
    if tiles is not None and form == "columns":
        ends_with_step = unit % step == 0
    constants = {
        "FORM": form,
        "ACTIVATION": activation,
        "EXACT": out.dtype == torch.float32,
        "INPUT_PRECISION": launch.input_precision(x.dtype),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": step,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.descriptors and inputs > 0:
        w_tile = [step, config.block_n] if form == "columns" else [config.block_n, step]
        out_tile = [config.block_m, config.block_n // config.subtiles]
        per_sm = config.persistent
        if tiles is not None and (form == "columns" or not tiles.one_width):
            per_sm = 0
        num_programs = min(num_tiles, launch.card(x.device)[1] * per_sm) if per_sm else num_tiles
        start(
            product_descriptor_kernel,
            (num_programs,),
            descriptor(x, [config.block_m, step]),
            descriptor(weight, w_tile),
            bias,
            None if other is None else descriptor(other, out_tile),
            descriptor(out, out_tile),
            None if second is None else descriptor(second, out_tile),
            out,
            second,
            table,
            seed,
            tokens,
            outputs,
            inputs,
            num_row_blocks,
            unit,
            dropout_p,
            scale,
            EVEN_K=tiles is None or form != "columns" or ends_with_step,
            SUBTILES=config.subtiles,
            PERSISTENT=per_sm > 0,
            **constants,
        )
        return
    start(
        product_kernel,
        (num_tiles, config.split_k),
        x,
        weight,
        bias,
        other,
        out,
        second,
        table,
        seed,
        tokens,
        outputs,
        inputs,
        num_row_blocks,
        unit,
        x.stride(0),
        0 if other is None else other.stride(0),
        dropout_p,
        scale,
        EVEN_K=ends_with_step,
        EVEN_N=outputs % config.block_n == 0,
        SPLIT_K=config.split_k,
        **constants,
    )
