"""Launches of Triton kernels for a card that is not here, by the short cut and by Triton itself.

    python tests/kernels/launch_triton.py

Every kernel of both ops, forward and backward, is compiled for sm_90; what would start it is
recorded instead. Prints as JSON how many launches there were, how many took the short cut
(`dynabert_kernels.triton.dispatch`), and those whose program or arguments were not Triton's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from compile_triton import CARD, NUM_SMS
from torch import Tensor
from triton.compiler import CompiledKernel

from dynabert_kernels.triton import (
    dispatch,
    launch,
    launch_attention,
    launch_gemm,
    launch_norm,
    row_tiles,
    weight_gradient,
)
from dynabert_kernels.triton.launch import Dropout

LAUNCHERS = (launch_attention, launch_gemm, launch_norm, row_tiles, weight_gradient)
Start = Callable[..., None]
Launch = tuple[int, tuple[int, ...], tuple[Any, ...]]
STARTED: list[Launch] = []


def record(kernel: CompiledKernel) -> Callable[..., None]:
    """What stands for the launcher of a compiled kernel: grid, and arguments past the hooks."""
    return lambda *given: STARTED.append((id(kernel), given[:3], given[9:]))


def is_same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return mine is theirs
    if hasattr(mine, "block_shape"):
        return mine.base is theirs.base and vars(mine) == vars(theirs) | {"base": mine.base}
    return type(mine) is type(theirs) and mine == theirs


def train(tokens: int, heads: int, neurons: int, each: bool, dtype: torch.dtype) -> None:
    """The kernels of a training step of both sublayers, by their launchers."""
    head_dim, hidden_size = 64, 256
    x = torch.empty(tokens, hidden_size, dtype=dtype)
    offsets = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    dropout = Dropout(0.1, torch.empty(1, dtype=torch.int64))
    vector = torch.empty(hidden_size, dtype=dtype)

    def width_of(limit: int) -> Any:
        widths = torch.tensor([limit, 1], dtype=torch.int32)
        return row_tiles.row_tiles(offsets, widths, tokens, limit) if each else limit

    inner = width_of(heads)
    qkv_weight = torch.empty(heads * 3 * head_dim, hidden_size, dtype=dtype)
    qkv = launch_gemm.rows_product(x, qkv_weight, None, width=inner, unit=3 * head_dim)
    assert isinstance(qkv, Tensor)
    qkv = qkv.view(tokens, heads, 3, head_dim)
    num_heads = torch.tensor([heads, 1], dtype=torch.int32) if each else heads
    core: dict[str, Any] = {"num_heads": num_heads, "dropout": dropout}
    context, log_sum = launch_attention.attention_core(
        qkv, offsets, tokens, keep_log_sum=True, **core
    )
    launch_attention.attention_core_gradient(
        context, qkv, context, log_sum, offsets, tokens, **core
    )
    wide = width_of(neurons)
    weight = torch.empty(neurons, hidden_size, dtype=dtype)
    options: dict[str, Any] = {"width": wide, "activation": "gelu"}
    active, before = launch_gemm.rows_product(x, weight, None, keep_before=True, **options)
    total = launch_gemm.columns_product(
        active, weight, width=wide, bias=vector, residual=x, dropout=dropout
    )
    normed = launch_norm.residual_norm(
        total, vector, x, vector, vector, 1e-12, dropout=dropout, keep_total=True
    )
    gradients = launch_norm.norm_gradient(
        x, normed.total, vector, 1e-12, dropout=dropout, projected_dtype=dtype
    )
    launch_gemm.rows_gradient(gradients.projected, weight, before, **options)
    weight_gradient.weight_gradient(
        active, x, width=wide, limit=neurons, dtype=torch.float32, with_bias=True
    )


def main() -> None:
    CARD.capability = 90
    triton.runtime.driver.set_active(CARD)
    launch.card = lambda device: (90, NUM_SMS[90])
    CompiledKernel.run = property(record)
    CompiledKernel._init_handles = lambda kernel: None
    CompiledKernel.function = CompiledKernel.packed_metadata = None
    CompiledKernel.launch_metadata = lambda kernel, *_: None
    result: dict[str, Any] = {"launches": 0, "short": 0, "different": []}
    start = dispatch.start

    def compared(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        before = dispatch.compilations()
        start(kernel, grid, *args, **options)
        kernel[grid](*args, **options)
        mine, theirs = STARTED
        STARTED.clear()
        result["launches"] += 1
        result["short"] += dispatch.compilations() == before
        same = mine[:2] == theirs[:2] and len(mine[2]) == len(theirs[2])
        if not same or not all(map(is_same, mine[2], theirs[2])):
            result["different"].append(kernel.fn.__name__)

    for module in LAUNCHERS:
        module.start = compared
    for dtype in (torch.bfloat16, torch.float32):
        for each in (False, True):
            # Twice each: the second time by the short cut, with other tensors.
            for tokens, heads, neurons in [(48, 2, 96), (48, 2, 96), (640, 2, 96), (640, 2, 96)]:
                train(tokens, heads, neurons, each, dtype)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
