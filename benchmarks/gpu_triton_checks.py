"""Every Triton path against the reference in float64, on the card itself; letters as elsewhere.

The bound is twice the error of PyTorch in the same dtype on the same inputs. Most of the time is
compilation, so `run_checks` starts one process per dtype and geometry:

    python -m benchmarks.gpu_triton_checks --dtype bfloat16 --geometry 0 --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import relative_error
from benchmarks.records import Deadline, Recorder, describe_machine
from dynabert_kernels import PackedAttention, PackedFFN, attention, ffn, use_backend

DEVICE = "cuda"
DTYPES = ("bfloat16", "float16", "float32")
# Heads, head size, hidden size, neurons.
GEOMETRIES = ((12, 64, 768, 3072), (12, 32, 384, 1536), (4, 80, 320, 200), (2, 128, 256, 77))
LENGTHS = {
    "one": [1],
    "odd": [7, 63, 1, 0, 128, 33],
    "dense128": [128] * 9,
    "long": [129, 300, 5, 512, 0, 77],
    "single-token": [1] * 40,
    "empty": [],
}


def ragged_attention(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Plain attention of each sequence, ``[T, H, 3, D]`` to ``[T, H, D]``."""
    pieces = []
    for piece in qkv.split(lengths):
        q, k, v = (piece[:, :, j].transpose(0, 1) for j in range(3))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


def random_weights(
    heads: int, head_dim: int, hidden: int, neurons: int, dtype: torch.dtype
) -> tuple[PackedAttention, PackedFFN]:
    """Both sublayers with fresh weights of realistic scale."""

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device=DEVICE) * scale).to(dtype)

    return (
        PackedAttention(
            normal(heads, 3, head_dim, hidden, scale=hidden**-0.5),
            normal(heads, 3, head_dim, scale=0.1),
            normal(heads, head_dim, hidden, scale=(heads * head_dim) ** -0.5),
            normal(hidden, scale=0.1),
            1 + normal(hidden, scale=0.1),
            normal(hidden, scale=0.1),
        ),
        PackedFFN(
            normal(neurons, hidden, scale=hidden**-0.5),
            normal(neurons, scale=0.1),
            normal(neurons, hidden, scale=neurons**-0.5),
            normal(hidden, scale=0.1),
            1 + normal(hidden, scale=0.1),
            normal(hidden, scale=0.1),
        ),
    )


def _double(weights: Any) -> Any:
    return type(weights)(
        *(
            value.double() if isinstance(value, torch.Tensor) else value
            for value in (getattr(weights, f.name) for f in dataclasses.fields(weights))
        )
    )


def _compare(run: Any, hidden: torch.Tensor, weights: Any) -> tuple[float, float]:
    """Errors of triton and of PyTorch in the same dtype against float64."""
    with use_backend("reference"):
        truth = run(hidden.double(), _double(weights))
        plain = run(hidden, weights)
    with use_backend("triton"):
        ours = run(hidden, weights)
        again = run(hidden, weights)
    if hidden.shape[0] == 0:
        return (0.0, 0.0) if ours.shape == truth.shape else (1.0, 0.0)
    if not torch.equal(ours, again):
        return float("inf"), 0.0
    return relative_error(ours, truth), relative_error(plain, truth)


Case = tuple[str, Callable[[torch.Tensor, Any], torch.Tensor], torch.Tensor, Any]


def _attend(num_heads: Any, cu: torch.Tensor, longest: int) -> Any:
    return lambda hidden, weights: attention(
        hidden, weights, num_heads=num_heads, cu_seqlens=cu, max_seqlen=longest
    )


def _feed(size: Any, cu: torch.Tensor) -> Any:
    return lambda hidden, weights: ffn(hidden, weights, intermediate_size=size, cu_seqlens=cu)


def _cases(dtype: torch.dtype, geometry: int) -> Iterator[Case]:
    heads, head_dim, hidden_size, neurons = GEOMETRIES[geometry]
    for name, lengths in LENGTHS.items():
        wa, wf = random_weights(heads, head_dim, hidden_size, neurons, dtype)
        cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
        longest = max(lengths, default=0)
        hidden = torch.randn(sum(lengths), hidden_size, device=DEVICE).to(dtype)
        label = f"{str(dtype)[6:]} H{heads} D{head_dim} C{hidden_size} {name}"
        for n in (1, heads // 2, heads):
            poisoned = dataclasses.replace(
                wa,
                qkv_weight=_nan_tail(wa.qkv_weight, n),
                qkv_bias=_nan_tail(wa.qkv_bias, n),
                out_weight=_nan_tail(wa.out_weight, n),
            )
            yield f"attention {label} n{n}", _attend(n, cu, longest), hidden, poisoned
        for n in (1, neurons // 2 + 1, neurons):
            poisoned_ffn = dataclasses.replace(
                wf,
                up_weight=_nan_tail(wf.up_weight, n),
                up_bias=_nan_tail(wf.up_bias, n),
                down_weight=_nan_tail(wf.down_weight, n),
            )
            yield f"ffn {label} n{n}", _feed(n, cu), hidden, poisoned_ffn
        if lengths:
            size = (len(lengths),)
            heads_each = torch.randint(1, heads + 1, size, device=DEVICE, dtype=torch.int32)
            sizes_each = torch.randint(1, neurons + 1, size, device=DEVICE, dtype=torch.int32)
            yield f"attention {label} each", _attend(heads_each, cu, longest), hidden, wa
            yield f"ffn {label} each", _feed(sizes_each, cu), hidden, wf


def _nan_tail(tensor: torch.Tensor, n: int) -> torch.Tensor:
    poisoned = tensor.clone()
    poisoned[n:] = float("nan")
    return poisoned


def check_one(dtype: torch.dtype, geometry: int, recorder: Recorder) -> dict[str, Any]:
    """Run every case of one dtype and geometry; a row each, and what failed."""
    checked = 0
    worst = (0.0, "")
    failures = []
    for label, run, hidden, weights in _cases(dtype, geometry):
        checked += 1
        try:
            ours, plain = _compare(run, hidden, weights)
        except Exception as error:
            failures.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
            recorder.add("check", label, error=failures[-1])
            continue
        bound = 2 * plain + 1e-6
        recorder.add("check", label, rel_err=ours, torch_err=plain, ok=ours <= bound)
        worst = max(worst, (round(ours / bound, 2), label))
        if not ours <= bound:
            failures.append(f"{label}: {ours:.2e} over {bound:.2e}")
    return {"checked": checked, "worst_of_bound": worst, "failures": failures}


def run_checks(recorder: Recorder, deadline: Deadline, best: dict[str, Any]) -> None:
    """Check every dtype and geometry, each in a process of its own, all at once."""
    out = recorder.path.parent
    processes = {
        (dtype, geometry): subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.gpu_triton_checks", "--dtype", dtype),
                *("--geometry", str(geometry), "--out", str(out)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for dtype in DTYPES
        for geometry in range(len(GEOMETRIES))
    }
    end_s = 0.45 * deadline.budget_s
    for (dtype, geometry), process in processes.items():
        try:
            text, _ = process.communicate(timeout=max(1.0, end_s - deadline.spent_s()))
            result = text.strip().splitlines()[-1] if text.strip() else "no output"
        except subprocess.TimeoutExpired:
            process.kill()
            result = "cut short"
        best["check"].append(f"{dtype} {GEOMETRIES[geometry]}: {result[:900]}")


def main() -> None:
    """Check one dtype and geometry; the last line of the output is the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--geometry", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    recorder = Recorder(options.out, describe_machine(DEVICE))
    recorder.path = options.out / "gpu_triton_checks.jsonl"
    dtype = getattr(torch, options.dtype)
    print(json.dumps(check_one(dtype, options.geometry, recorder)), flush=True)


if __name__ == "__main__":
    main()
