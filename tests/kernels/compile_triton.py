"""Compiles Triton kernels for cards that are not here: what to compile, and what it needs, as JSON.

    echo '[{"launch": "norm", "capability": 90, "dtype": "float16", "channels": 768, "parts": 1,
        "training": false}]' |
        python tests/kernels/compile_triton.py

The project's own launchers run, so each kernel is compiled for the arguments it is launched with;
the driver beneath them names a card instead of finding one, and nothing is executed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dynabert_kernels.triton import (
    embeddings,
    launch,
    launch_attention,
    launch_gemm,
    launch_norm,
    padding,
)
from dynabert_kernels.triton.row_tiles import RowTiles
from dynabert_kernels.triton.weight_gradient import weight_gradient

NUM_SMS = {80: 108, 90: 132}


class NamedCard:
    """A driver for a card that is known by its capability alone; the device number is that."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


CARD = NamedCard()
COMPILED: list[Any] = []
run_or_compile = JITFunction.run


def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
    kwargs["warmup"] = True
    COMPILED.append(run_or_compile(self, *args, **kwargs))


def launch_product(case: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, outputs, inputs = case["tokens"], case["outputs"], case["inputs"]
    x = torch.empty(tokens, inputs, dtype=dtype)
    elastic = inputs if case["form"] == "columns" else outputs
    options: dict[str, Any] = {"width": elastic}
    if case["tiled"]:
        block_m = 64 if tokens <= 2048 else 128
        table = torch.empty(-(-tokens // block_m), 3, dtype=torch.int32)
        options["width"] = RowTiles(table, block_m, elastic)
    if case["form"] == "columns":
        weight = torch.empty(inputs, outputs, dtype=dtype)
        residual = torch.empty(tokens, outputs, dtype=torch.float32 if case["training"] else dtype)
        if case["training"]:
            options["dropout"] = launch.Dropout(0.1, torch.zeros(1, dtype=torch.int64))
        bias = torch.empty(outputs, dtype=dtype)
        launch_gemm.columns_product(x, weight, bias=bias, residual=residual, **options)
        return
    weight, activation = torch.empty(outputs, inputs, dtype=dtype), case["activation"]
    if case["form"] == "gradient":
        before = torch.empty(tokens, outputs, dtype=dtype)
        launch_gemm.rows_gradient(x, weight, before, activation=activation, **options)
        return
    bias, keep = torch.empty(outputs, dtype=dtype), case["training"]
    launch_gemm.rows_product(x, weight, bias, activation=activation, keep_before=keep, **options)


def launch_core(case: dict[str, Any], dtype: torch.dtype) -> None:
    # By default enough sequences for the table to give a program several heads.
    batch_size, max_seqlen = case["batch_size"], case["max_seqlen"]
    tokens = batch_size * max_seqlen // 4 if case["short"] else batch_size * max_seqlen
    qkv = torch.empty(tokens, 12, 3, case["head_dim"], dtype=dtype)
    place = (torch.zeros(batch_size + 1, dtype=torch.int32), max_seqlen)
    dropout = None
    if case["dropout"]:
        dropout = launch.Dropout(0.1, torch.zeros(1, dtype=torch.int64))
    options: dict[str, Any] = {
        "num_heads": torch.ones(1, dtype=torch.int32) if case["device_heads"] else 12,
        "dropout": dropout,
    }
    if case["launch"] == "attention":
        launch_attention.attention_core(qkv, *place, keep_log_sum=case["dropout"], **options)
    else:
        context, log_sum = qkv[:, :, 0].contiguous(), torch.empty(12, qkv.shape[0])
        launch_attention.attention_core_gradient(context, qkv, context, log_sum, *place, **options)


def launch_row_norm(case: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, channels, parts = 4096, case["channels"], case["parts"]
    row, vector = torch.empty(tokens, channels, dtype=dtype), torch.empty(channels, dtype=dtype)
    dropout = num_tokens = None
    if case["training"]:
        dropout = launch.Dropout(0.1, torch.zeros(1, dtype=torch.int64))
        num_tokens = torch.zeros(1, dtype=torch.int32)
    options: dict[str, Any] = {"dropout": dropout, "num_tokens": num_tokens}
    if case["launch"] == "norm_gradient":
        launch_norm.norm_gradient(row, row, vector, 1e-12, projected_dtype=dtype, **options)
        return
    x = row if parts == 1 else torch.empty(parts, tokens, channels)
    options["keep_total"] = case["training"]
    launch_norm.residual_norm(x, vector, row, vector, vector, 1e-12, **options)


def launch_weight_gradient(case: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, outputs, inputs = case["tokens"], case["outputs"], case["inputs"]
    rows, x = torch.empty(tokens, outputs, dtype=dtype), torch.empty(tokens, inputs, dtype=dtype)
    width: int | RowTiles = outputs
    if case["tiled"]:
        width = RowTiles(torch.empty(-(-tokens // 128), 3, dtype=torch.int32), 128, outputs)
    weight_gradient(rows, x, width=width, limit=outputs, dtype=dtype, with_bias=case["with_bias"])


def launch_padding(case: dict[str, Any], dtype: torch.dtype) -> None:
    mask = torch.ones(16, case["seq_len"], dtype=torch.bool)
    order = torch.arange(16) if case["ordered"] else None
    _, _, slots = padding.unpad(mask, order)
    padding.restore(torch.empty(mask.numel(), case["channels"], dtype=dtype), slots)


def launch_embeddings(case: dict[str, Any], dtype: torch.dtype) -> None:
    ids, given = torch.zeros(16, 128, dtype=torch.int64), case["given"]
    optional = (ids, ids, ids.view(-1), torch.zeros(1, dtype=torch.int32))
    table = torch.empty(512, case["channels"], dtype=dtype)
    tables = (table, table, table, table[0], table[0])
    chosen = optional if given else (None,) * 4
    embeddings.embeddings(ids, *chosen, tables, first_position=2, norm_eps=1e-12)


LAUNCHERS = {
    "padding": launch_padding,
    "embeddings": launch_embeddings,
    "product": launch_product,
    "attention": launch_core,
    "attention_gradient": launch_core,
    "norm": launch_row_norm,
    "norm_gradient": launch_row_norm,
    "weight_gradient": launch_weight_gradient,
}
# Where a launch starts small kernels without products beside the one that counts.
MAIN_KERNELS = {"weight_gradient": "weight_gradient_kernel"}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory by the disassembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """What the kernel of one case needs, or why it does not compile."""
    CARD.capability = case["capability"]
    COMPILED.clear()
    try:
        LAUNCHERS[case["launch"]](case, getattr(torch, case["dtype"]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    needs = [kernel_needs(kernel) for kernel in COMPILED]
    # Of several kernels the greediest, and the one with the fewest instructions of a kind.
    fewest = ("wgmma", "mma", "tensor_core", "copy_engine")
    main = MAIN_KERNELS.get(case["launch"])
    counted = [n for n, kernel in zip(needs, COMPILED, strict=True) if main in (None, kernel.name)]
    return {
        name: min(n[name] for n in counted) if name in fewest else max(n[name] for n in needs)
        for name in needs[0]
    }


def kernel_needs(kernel: Any) -> dict[str, int]:
    """What one kernel needs, and how often it uses what makes it fast."""
    ptx = kernel.asm["ptx"]
    wgmma, mma = ptx.count("wgmma.mma_async"), ptx.count("mma.sync")
    return {
        "shared": kernel.metadata.shared,
        "wgmma": wgmma,
        "mma": mma,
        "tensor_core": wgmma + mma,
        "copy_engine": ptx.count("cp.async.bulk.tensor"),
        **resources(kernel.asm["cubin"]),
    }


def main() -> None:
    triton.runtime.driver.set_active(CARD)
    JITFunction.run = compile_only
    launch.card = lambda device: (CARD.capability, NUM_SMS[CARD.capability])
    print(json.dumps([compile_case(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
