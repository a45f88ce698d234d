"""Compiles Triton kernels for cards that are not here: what to compile, and what it needs, as JSON.

    echo '[{"launch": "norm", "capability": 90, "dtype": "float16", "channels": 768, "parts": 1}]' |
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

from dynabert_kernels.triton import launch

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


def launch_linear(case: dict[str, Any], dtype: torch.dtype) -> None:
    tokens, outputs, inputs = case["tokens"], case["outputs"], case["inputs"]
    columns = case["form"] == "columns"
    x = torch.empty(tokens, inputs, dtype=dtype)
    weight = torch.empty((inputs, outputs) if columns else (outputs, inputs), dtype=dtype)
    residual = torch.empty(tokens, outputs, dtype=dtype) if columns else None
    bias = torch.empty(outputs, dtype=dtype)
    launch.linear(case["form"], x, weight, bias, activation=case["activation"], residual=residual)


def launch_attention(case: dict[str, Any], dtype: torch.dtype) -> None:
    qkv = torch.empty(4, 12, 3, case["head_dim"], dtype=dtype)
    launch.attention_core(qkv, torch.tensor([0, 4], dtype=torch.int32), case["max_seqlen"])


def launch_norm(case: dict[str, Any], dtype: torch.dtype) -> None:
    channels, parts = case["channels"], case["parts"]
    row = torch.empty(4, channels, dtype=dtype)
    x = row if parts == 1 else torch.empty(parts, 4, channels)
    vector = torch.empty(channels, dtype=dtype)
    launch.residual_norm(x, vector, row, vector, vector, 1e-12)


LAUNCHERS = {"linear": launch_linear, "attention": launch_attention, "norm": launch_norm}


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
    (kernel,) = COMPILED
    return {
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
        "copy_engine": kernel.asm["ptx"].count("cp.async.bulk.tensor"),
        **resources(kernel.asm["cubin"]),
    }


def main() -> None:
    triton.runtime.driver.set_active(CARD)
    JITFunction.run = compile_only
    launch.card = lambda device: (CARD.capability, NUM_SMS[CARD.capability])
    print(json.dumps([compile_case(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
