"""A whole encoder through the ops in one CUDA graph, beside the same layers in plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.geometry import short_text_lengths
from benchmarks.gpu_attention import attend
from benchmarks.gpu_timing import Variant, graphed, measure, relative_error
from benchmarks.gpu_triton_checks import random_weights
from benchmarks.records import Deadline, Recorder
from dynabert_kernels import attention, ffn, use_backend

DEVICE = "cuda"


def _ours(layers: Any, hidden: Any, heads: Any, neurons: Any, cu: Any, longest: int) -> Any:
    for wa, wf in layers:
        hidden = attention(hidden, wa, num_heads=heads, cu_seqlens=cu, max_seqlen=longest)
        hidden = ffn(hidden, wf, intermediate_size=neurons, cu_seqlens=cu)
    return hidden


def dense_layers(layers: Any, heads: int, neurons: int) -> Any:
    """The extracted dense weights a static model would have, merged as cuBLAS likes them."""
    dense = []
    for wa, wf in layers:
        head_dim, hidden = wa.head_dim, wa.hidden_size
        qkv = wa.qkv_weight[:heads].transpose(0, 1).reshape(-1, hidden).contiguous()
        qkv_bias = wa.qkv_bias[:heads].transpose(0, 1).reshape(-1).contiguous()
        out = wa.out_weight[:heads].reshape(heads * head_dim, hidden).t().contiguous()
        down = wf.down_weight[:neurons].t().contiguous()
        dense.append((qkv, qkv_bias, out, wa, wf.up_weight[:neurons].clone(), down, wf, neurons))
    return dense


def _plain(dense: Any, hidden: Any, batch_size: int, heads: int, head_dim: int, sdpa: str) -> Any:
    size = (hidden.shape[1],)
    for qkv, qkv_bias, out, wa, up, down, wf, neurons in dense:
        merged = F.linear(hidden, qkv, qkv_bias).view(batch_size, -1, 3, heads, head_dim)
        context = attend(merged, sdpa).transpose(1, 2).reshape(hidden.shape[0], -1)
        hidden = F.layer_norm(
            F.linear(context, out, wa.out_bias) + hidden, size, wa.norm_weight, wa.norm_bias, 1e-12
        )
        inner = F.gelu(F.linear(hidden, up, wf.up_bias[:neurons]))
        hidden = F.layer_norm(
            F.linear(inner, down, wf.down_bias) + hidden, size, wf.norm_weight, wf.norm_bias, 1e-12
        )
    return hidden


def run_encoder(
    recorder: Recorder, deadline: Deadline, best: Any, geometry: Any, subnets: Any, subnet_type: Any
) -> None:
    """Time the encoder at 128 x 128, 8 x 128, 1 x 128 and on short texts."""
    g = geometry
    layers = [
        random_weights(g.num_heads, g.head_dim, g.hidden_size, g.intermediate_size, torch.bfloat16)
        for _ in range(g.num_layers)
    ]
    batches = {
        "128x128": [128] * 128,
        "1x128": [128],
        "8x128": [128] * 8,
        "short512": short_text_lengths(512, 128),
    }
    with use_backend("triton"):
        for (name, lengths), (width, depth) in itertools.product(batches.items(), subnets):
            if deadline.left_s() < 8:
                print("encoder cut short", flush=True)
                return
            subnet = subnet_type(g, width, depth)
            case = f"{name} {subnet.name}"
            with recorder.guarded("encoder", case):
                _time_case(recorder, best, case, subnet, lengths, layers)


def _time_case(
    recorder: Recorder, best: Any, case: str, subnet: Any, lengths: list[int], layers: Any
) -> None:
    g = subnet.geometry
    kept = [layers[i] for i in subnet.layers]
    heads, neurons = subnet.num_heads, subnet.intermediate_size
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    tokens, longest, batch_size = sum(lengths), max(lengths), len(lengths)
    hidden = torch.randn(tokens, g.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    many = torch.full((batch_size,), heads, dtype=torch.int32, device=DEVICE)
    some = torch.full((batch_size,), neurons, dtype=torch.int32, device=DEVICE)
    calls = {
        "ours": lambda: _ours(kept, hidden, heads, neurons, cu, longest),
        "ours device width": lambda: _ours(kept, hidden, many, some, cu, longest),
    }
    if min(lengths) == longest:
        dense = dense_layers(kept, heads, neurons)
        for sdpa in ("flash", "cudnn"):
            calls[f"torch {sdpa}"] = lambda s=sdpa: _plain(
                dense, hidden, batch_size, heads, g.head_dim, s
            )
    variants: dict[str, Variant] = {}
    for name, call in calls.items():
        with recorder.guarded("encoder", case, peer=name):
            variants[name] = graphed([call], DEVICE, fall_back=False)
            variants[name].run()
    torch.cuda.synchronize()
    outputs = {name: variant.output.clone() for name, variant in variants.items()}
    errors = {
        name: round(relative_error(output, outputs["ours"]), 4) for name, output in outputs.items()
    }
    timings = measure(variants, DEVICE, samples=11, max_s=2.0)
    flops = float(subnet.ragged_flops(lengths))
    for name, timing in timings.items():
        recorder.add(
            "encoder", case, timing=timing, flops=flops, peer=name, vs_ours=errors.get(name)
        )
    times = {name: round(t.median_ms, 4) for name, t in timings.items()}
    rate = batch_size / timings["ours"].median_ms * 1e3 if "ours" in timings else 0
    best["encoder"].append({"case": case, "ms": times, "seq_s": round(rate), "diff": errors})
