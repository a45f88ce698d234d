"""Triton kernels on a GPU: check them, sweep their configurations, time them against PyTorch.

    python -m benchmarks.gpu_triton --out DIR [--budget-s 240] [--sections check,gemm,norm,...]

Rows go to DIR/gpu_triton.jsonl as they are taken, the best configuration of each problem to
DIR/triton_best.json, and a short table to stdout at the end. Nothing is timed whose output does
not match the reference. Letters: see `benchmarks.geometry`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import gpu_triton_checks
from benchmarks.geometry import BASE, SUBNETS, Geometry, Subnet, short_text_lengths
from benchmarks.gpu_attention import attend
from benchmarks.gpu_timing import Variant, graphed, heat_up, measure, relative_error
from benchmarks.gpu_triton_encoder import run_encoder
from benchmarks.records import Deadline, Recorder, describe_machine
from dynabert_kernels.triton import configs, launch
from dynabert_kernels.triton.configs import AttentionConfig, LinearConfig, NormConfig

DEVICE = "cuda"
L = LinearConfig
MINI = Geometry("minilm", 384, 12, 32, 1536, 6)

LARGE_CONFIGS = [
    L(128, 128, 64, 4, 3, descriptors=True),
    L(128, 128, 64, 4, 3, descriptors=True, group_m=16),
    L(128, 128, 64, 8, 3, descriptors=True),
    L(128, 128, 64, 8, 4, descriptors=True),
    L(128, 128, 128, 8, 2, descriptors=True),
    L(128, 256, 64, 8, 3, descriptors=True),
    L(128, 256, 64, 8, 4, descriptors=True),
    L(256, 128, 64, 8, 3, descriptors=True),
    L(256, 128, 64, 8, 4, descriptors=True),
    L(128, 256, 64, 8, 3, descriptors=True, programs_per_sm=1),
    L(128, 256, 64, 8, 3, descriptors=True, programs_per_sm=1, subtiles=2),
    L(128, 256, 64, 8, 3, descriptors=True, programs_per_sm=1, subtiles=2, flatten=True),
    L(128, 128, 64, 4, 3, descriptors=True, programs_per_sm=2, subtiles=2),
    L(128, 128, 64, 8, 3, descriptors=True, programs_per_sm=2, subtiles=2, flatten=True),
    L(64, 256, 64, 4, 3, descriptors=True),
    L(64, 128, 64, 4, 4, descriptors=True),
    L(128, 64, 64, 4, 4, descriptors=True),
    L(64, 64, 64, 4, 4, descriptors=True),
    L(128, 128, 64, 4, 3),
    L(128, 256, 64, 8, 3),
    L(128, 128, 32, 4, 4),
    L(64, 128, 64, 4, 4),
]
SMALL_CONFIGS = [
    L(64, 32, 128, 4, 4),
    L(64, 32, 128, 4, 4, descriptors=True),
    L(64, 32, 64, 4, 6),
    L(64, 32, 256, 4, 3),
    L(64, 64, 64, 4, 5),
    L(64, 64, 128, 4, 4),
    L(64, 64, 128, 4, 4, descriptors=True),
    L(64, 16, 128, 4, 5),
    L(128, 16, 128, 4, 4),
    L(128, 32, 128, 4, 4),
    L(128, 32, 128, 4, 4, descriptors=True),
    L(32, 32, 128, 4, 4),
    L(16, 64, 128, 4, 4),
]
SPLITS = [
    L(64, 32, 128, 4, 4, split_k=2),
    L(64, 32, 128, 4, 4, split_k=4),
    L(64, 64, 128, 4, 4, split_k=2),
    L(64, 64, 128, 4, 4, split_k=4),
    L(64, 64, 128, 4, 4, split_k=8),
    L(128, 64, 128, 4, 3, split_k=4),
    L(128, 64, 128, 4, 3, split_k=8),
    L(128, 32, 128, 4, 4, split_k=4),
]
NORM_CONFIGS = [
    NormConfig(r, w) for r, w in ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (4, 8), (8, 8))
]
ATTENTION_SINGLE = [
    AttentionConfig(q, 128, w, 1) for q, w in ((128, 4), (128, 8), (64, 4), (32, 4), (32, 2))
]
ATTENTION_STREAM = [
    AttentionConfig(q, k, w, s)
    for q, k, w, s in (
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 4, 2),
        (128, 128, 8, 3),
    )
]
HOST = launch.Width(0, 0)
Best = dict[str, Any]


def precompile(calls: list[Callable[[], Any]]) -> None:
    """Compile in parallel; failures come up again where the configuration is timed."""

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            del error  # timed later, where it becomes a row

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, calls))
    torch.cuda.synchronize()


def linear_cases(geometry: Geometry, width: float) -> dict[str, tuple[str, int, int, str]]:
    """Form, outputs, inputs and activation of the four products of a layer."""
    inner = geometry.heads(width) * geometry.head_dim
    neurons = geometry.neurons(width)
    hidden = geometry.hidden_size
    return {
        "qkv": ("rows", 3 * inner, hidden, "none"),
        "up": ("rows", neurons, hidden, "gelu"),
        "out": ("columns", hidden, inner, "none"),
        "down": ("columns", hidden, neurons, "none"),
    }


def candidates(tokens: int, form: str) -> list[LinearConfig]:
    """Configurations worth timing for this many tokens."""
    if tokens <= 256:
        return SMALL_CONFIGS + (SPLITS if form == "columns" else [])
    if tokens <= 2048:
        return LARGE_CONFIGS + SMALL_CONFIGS[4:7] + (SPLITS[2:4] if form == "columns" else [])
    return LARGE_CONFIGS


def sweep_linear(
    recorder: Recorder, geometry: Geometry, tokens: int, width: float, kind: str, best: Best
) -> None:
    """Time every candidate for one product, beside cuBLAS with and without its epilogue."""
    form, outputs, inputs, activation = linear_cases(geometry, width)[kind]
    columns = form == "columns"
    bf16 = dict(device=DEVICE, dtype=torch.bfloat16)
    rotations = 3 if tokens > 2048 else 8
    shape = (inputs, outputs) if columns else (outputs, inputs)
    xs = [torch.randn(tokens, inputs, **bf16) for _ in range(rotations)]
    ws = [torch.randn(*shape, **bf16) * inputs**-0.5 for _ in range(rotations)]
    residuals = [
        torch.randn(tokens, outputs, **bf16) if columns else None for _ in range(rotations)
    ]
    bias = torch.randn(outputs, **bf16)
    product = xs[-1].float() @ (ws[-1].float() if columns else ws[-1].float().T)
    expected = product + bias.float()
    if activation == "gelu":
        expected = F.gelu(expected)
    if columns:
        expected = expected + residuals[-1].float()

    def cublas(i: int) -> torch.Tensor:
        if columns:
            return torch.addmm(bias, xs[i], ws[i])
        return F.linear(xs[i], ws[i], bias)

    def cublas_epilogue(i: int) -> torch.Tensor:
        y = cublas(i)
        return y + residuals[i] if columns else F.gelu(y)

    variants: dict[str, Variant] = {}
    graph = partial(graphed, device=DEVICE, fall_back=False)
    variants["cublas"] = graph([partial(cublas, i) for i in range(rotations)])
    if columns or activation == "gelu":
        variants["cublas+epilogue"] = graph([partial(cublas_epilogue, i) for i in range(rotations)])
    case = f"{kind} {geometry.name} T{tokens} w{width:g}"
    configs_by_name = {}
    for config in candidates(tokens, form):

        def ours(i: int, config: LinearConfig = config) -> torch.Tensor:
            return launch.linear(
                form,
                xs[i],
                ws[i],
                bias,
                HOST,
                activation=activation,
                residual=residuals[i],
                config=config,
            )

        try:
            variant = graph([partial(ours, i) for i in range(rotations)])
            variant.run()
            torch.cuda.synchronize()
            wanted, got = expected, variant.output
            if config.split_k > 1:
                wanted, got = product, got.sum(0)
            error = relative_error(got, wanted)
            if not error < 4e-3:
                raise ValueError(f"relative error {error:.2e}")
        except Exception as error:
            recorder.add("gemm", case, error=f"{type(error).__name__}: {error}", peer=config.name)
            continue
        variants[config.name] = variant
        configs_by_name[config.name] = config
    timings = measure(variants, DEVICE, samples=9, max_s=1.5)
    flops = 2.0 * tokens * outputs * inputs
    for name, timing in timings.items():
        recorder.add("gemm", case, timing=timing, flops=flops, peer=name, kind=kind, tokens=tokens)
    ours_only = {name: timings[name].median_ms for name in configs_by_name}
    winner = min(ours_only, key=lambda name: ours_only[name])
    unsplit = min(
        (n for n in ours_only if configs_by_name[n].split_k == 1), key=lambda n: ours_only[n]
    )
    best["linear"].append(
        {
            "case": case,
            "form": form,
            "tokens": tokens,
            "outputs": outputs,
            "inputs": inputs,
            "config": asdict(configs_by_name[winner]),
            "unsplit": asdict(configs_by_name[unsplit]),
            "ms": ours_only[winner],
            "unsplit_ms": ours_only[unsplit],
            "cublas_ms": timings["cublas"].median_ms,
            "cublas_epilogue_ms": timings.get("cublas+epilogue", timings["cublas"]).median_ms,
            "tflops": flops / ours_only[winner] / 1e9,
            "top": sorted((round(ms * 1e3, 2), name) for name, ms in ours_only.items())[:4],
        }
    )


def section_gemm(recorder: Recorder, deadline: Deadline, best: Best) -> None:
    """Sweep every product of a layer: tokens, hidden sizes and widths."""
    calls: list[Callable[[], Any]] = []
    for form, activation in (("rows", "none"), ("rows", "gelu"), ("columns", "none")):
        seen = {
            config.name + str(config.group_m): config
            for config in LARGE_CONFIGS + SMALL_CONFIGS + (SPLITS if form == "columns" else [])
        }
        for config in seen.values():
            x = torch.randn(256, 512, device=DEVICE, dtype=torch.bfloat16)
            w = torch.randn(512, 512, device=DEVICE, dtype=torch.bfloat16)
            residual = x if form == "columns" else None
            calls.append(
                partial(
                    launch.linear,
                    form,
                    x,
                    w,
                    w[0],
                    HOST,
                    activation=activation,
                    residual=residual,
                    config=config,
                )
            )
    precompile(calls)
    print(f"compiled {len(calls)} kernels by {deadline.spent_s():.0f} s", flush=True)
    heat_up(DEVICE)
    order = itertools.chain(
        itertools.product((BASE,), (16384, 128), (1.0, 0.25, 0.5)),
        itertools.product((BASE,), (1024,), (1.0, 0.25)),
        itertools.product((MINI,), (16384, 128), (1.0, 0.5)),
    )
    for geometry, tokens, width in order:
        for kind in ("qkv", "up", "out", "down"):
            if deadline.left_s() < 75:
                print("gemm sweep cut short", flush=True)
                return
            case = f"{kind} {geometry.name} T{tokens} w{width:g}"
            with recorder.guarded("gemm", case):
                sweep_linear(recorder, geometry, tokens, width, kind, best)


def sweep_norm(recorder: Recorder, tokens: int, parts: int, best: Best) -> None:
    """Time the row kernel's configurations, beside PyTorch's add and layer_norm."""
    hidden_size, rotations = BASE.hidden_size, 4
    bf16 = dict(device=DEVICE, dtype=torch.bfloat16)
    residuals = [torch.randn(tokens, hidden_size, **bf16) for _ in range(rotations)]
    size = (tokens, hidden_size) if parts == 1 else (parts, tokens, hidden_size)
    xs = [torch.randn(size, device=DEVICE) for _ in range(rotations)]
    if parts == 1:
        xs = [x.bfloat16() for x in xs]
    bias, weight, shift = torch.randn(3, hidden_size, **bf16)

    def ours(i: int, config: NormConfig) -> torch.Tensor:
        return launch.residual_norm(xs[i], bias, residuals[i], weight, shift, 1e-12, config=config)

    def torchs(i: int) -> torch.Tensor:
        y = xs[i] if parts == 1 else xs[i].sum(0).to(torch.bfloat16)
        return F.layer_norm(y + residuals[i], (hidden_size,), weight, shift, 1e-12)

    variants = {"torch": graphed([partial(torchs, i) for i in range(rotations)], DEVICE)}
    for config in NORM_CONFIGS:
        name = f"rows{config.rows} w{config.num_warps}"
        variants[name] = graphed([partial(ours, i, config) for i in range(rotations)], DEVICE)
    timings = measure(variants, DEVICE, samples=9)
    moved = 2.0 * tokens * hidden_size * 2 if parts == 1 else 4.0 * tokens * hidden_size * parts
    for name, timing in timings.items():
        case = f"norm T{tokens} parts{parts}"
        recorder.add("norm", case, timing=timing, bytes_moved=moved, peer=name)
    times = {name: round(t.median_ms * 1e3, 2) for name, t in timings.items()}
    best["norm"].append({"tokens": tokens, "parts": parts, "us": times})


def section_norm(recorder: Recorder, deadline: Deadline, best: Best) -> None:
    """The row kernel alone."""
    for tokens, parts in ((16384, 1), (1024, 1), (128, 1), (128, 4), (128, 8)):
        with recorder.guarded("norm", f"norm T{tokens} parts{parts}"):
            sweep_norm(recorder, tokens, parts, best)


def section_attention(recorder: Recorder, deadline: Deadline, best: Best) -> None:
    """The attention core, dense and ragged, beside SDPA."""
    cases = [
        (lengths, heads, head_dim)
        for heads, head_dim in ((12, 64), (3, 64), (12, 32))
        for lengths in ([128] * 128, [256] * 64, [512] * 32, short_text_lengths(512, 128), [128])
    ]
    calls = []
    for config in ATTENTION_SINGLE + ATTENTION_STREAM:
        for head_dim in (32, 64):
            qkv = torch.randn(512, 2, 3, head_dim, device=DEVICE, dtype=torch.bfloat16)
            for longest in (512, 128):
                cu = torch.arange(0, 513, longest, device=DEVICE, dtype=torch.int32)
                calls.append(partial(launch.attention_core, qkv, cu, longest, HOST, config=config))
    precompile(calls)
    for lengths, heads, head_dim in cases:
        if deadline.left_s() < 45:
            print("attention sweep cut short", flush=True)
            return
        batch_size, longest = len(lengths), max(lengths)
        dense = min(lengths) == longest
        case = f"B{batch_size} S{longest} H{heads} D{head_dim} " + ("dense" if dense else "ragged")
        with recorder.guarded("attention", case):
            tokens = sum(lengths)
            cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
            bf16 = dict(device=DEVICE, dtype=torch.bfloat16)
            qkvs = [torch.randn(tokens, heads, 3, head_dim, **bf16) for _ in range(3)]
            variants: dict[str, Variant] = {}
            expected = gpu_triton_checks.ragged_attention(qkvs[-1].float(), lengths)
            named = {}
            for config in ATTENTION_SINGLE if longest <= 128 else ATTENTION_STREAM:
                run = partial(launch.attention_core, cu_seqlens=cu, max_seqlen=longest, width=HOST)
                try:
                    variant = graphed(
                        [partial(run, q, config=config) for q in qkvs], DEVICE, fall_back=False
                    )
                    variant.run()
                    error = relative_error(variant.output, expected)
                    if not error < 5e-3:
                        raise ValueError(f"relative error {error:.2e}")
                except Exception as error:
                    recorder.add("attention", case, error=str(error), peer=config.name)
                    continue
                variants[config.name] = variant
                named[config.name] = config
            if dense:
                size = (batch_size, longest, 3, heads, head_dim)
                merged = [torch.randn(size, **bf16) for _ in range(3)]
                for backend in ("flash", "cudnn"):
                    with recorder.guarded("attention", case, peer=backend):
                        variants[backend] = graphed(
                            [partial(attend, m, backend) for m in merged], DEVICE, fall_back=False
                        )
            timings = measure(variants, DEVICE, samples=9)
            flops = float(sum(4 * n * n * heads * head_dim for n in lengths))
            moved = 8.0 * tokens * heads * head_dim
            for name, timing in timings.items():
                recorder.add(
                    "attention", case, timing=timing, flops=flops, bytes_moved=moved, peer=name
                )
            times = {name: round(t.median_ms * 1e3, 2) for name, t in timings.items()}
            best["attention"].append({"case": case, "us": times})


def install(best: Best) -> None:
    """Make the op use what the sweep found, nearest problem first."""
    found = best["linear"]
    if not found:
        return
    table = configs.linear_config

    def chosen(form: str, *, tokens: int, outputs: int, inputs: int, **rest: Any) -> LinearConfig:
        def distance(row: dict[str, Any]) -> float:
            return sum(
                abs(torch.tensor(a / b).log().item())
                for a, b in (
                    (row["tokens"], tokens),
                    (row["outputs"], outputs),
                    (row["inputs"], inputs),
                )
            )

        rows = [row for row in found if row["form"] == form]
        if rest["dtype"] == torch.float32 or not rest["descriptors"] or not rows:
            return table(form, tokens=tokens, outputs=outputs, inputs=inputs, **rest)
        return LinearConfig(**min(rows, key=distance)["config"])

    configs.linear_config = chosen


def short_table(best: Best) -> str:
    """What the sweep found, a line per problem."""
    lines = ["case                      us  TF/s | cublas  +epi | best config"]
    for row in best["linear"]:
        lines.append(
            f"{row['case']:24s} {row['ms'] * 1e3:6.1f} {row['tflops']:5.0f} | "
            f"{row['cublas_ms'] * 1e3:6.1f} {row['cublas_epilogue_ms'] * 1e3:6.1f} | "
            + "; ".join(f"{us} {name}" for us, name in row["top"][:2])
        )
    lines += [f"norm T{r['tokens']} parts{r['parts']} {r['us']}" for r in best["norm"]]
    lines += [f"{r['case']} {r['us']}" for r in best["attention"]]
    lines += [f"encoder {r}" for r in best["encoder"]]
    lines += [f"CHECK {r}" for r in best["check"]]
    return "\n".join(lines)


def main() -> None:
    """Run the sections named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=240)
    parser.add_argument("--sections", default="check,gemm,norm,attention,encoder")
    options = parser.parse_args()
    deadline = Deadline(options.budget_s)
    options.out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(options.out, describe_machine(DEVICE))
    recorder.path = options.out / "gpu_triton.jsonl"
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    best: Best = {"linear": [], "norm": [], "attention": [], "encoder": [], "check": []}
    sections: dict[str, Callable[[], None]] = {
        "check": partial(gpu_triton_checks.run_checks, recorder, deadline, best),
        "norm": partial(section_norm, recorder, deadline, best),
        "gemm": partial(section_gemm, recorder, deadline, best),
        "attention": partial(section_attention, recorder, deadline, best),
        "encoder": partial(run_encoder, recorder, deadline, best, BASE, SUBNETS, Subnet),
    }
    for name, run in sections.items():
        if name not in options.sections.split(","):
            continue
        try:
            if name == "encoder":
                install(best)
            run()
        except Exception:
            traceback.print_exc()
        (options.out / "triton_best.json").write_text(json.dumps(best, indent=1))
        print(f"section {name} done at {deadline.spent_s():.0f} s", flush=True)
    print(short_table(best), flush=True)


if __name__ == "__main__":
    main()
