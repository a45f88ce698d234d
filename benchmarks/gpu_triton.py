"""Triton kernels on a GPU: configurations swept and timed beside PyTorch, and a whole encoder.

    python -m benchmarks.gpu_triton --out DIR [--budget-s 240]

Rows go to DIR/gpu_triton.jsonl as they are taken. Nothing is timed that fails the tests' tolerance
against float64; such a case is a row with its error. `pytest tests/kernels -k triton` on the card
comes first: it holds the correctness, of which this is only the gate. No run is recorded yet.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.geometry import BASE, SUBNETS, Geometry, Subnet, short_text_lengths
from benchmarks.gpu_timing import Variant, graphed, heat_up, measure
from benchmarks.records import Deadline, Recorder, describe_machine, format_table
from dynabert_kernels import PackedAttention, PackedFFN, attention, ffn, use_backend
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.triton import launch
from dynabert_kernels.triton.configs import SMALL_BATCH, AttentionConfig, Form, LinearConfig
from dynabert_kernels.varlen import offsets_of

# Beside the table's own choice, which is None. None of these spills registers or exceeds shared
# memory at BERT-base's sizes; 128 x 256 tiles do, with the erf-GELU epilogue.
LARGE: tuple[LinearConfig | None, ...] = (
    None,
    LinearConfig(64, 128, 64, 4, 4, descriptors=True),
    LinearConfig(128, 64, 64, 4, 4, descriptors=True),
    LinearConfig(128, 128, 64, 8, 3),
    LinearConfig(64, 128, 64, 4, 4),
)
SMALL: tuple[LinearConfig | None, ...] = (
    None,
    LinearConfig(64, 32, 128, 4, 4),
    LinearConfig(64, 64, 128, 4, 4),
    LinearConfig(64, 32, 128, 4, 4, descriptors=True),
)
CORES: tuple[AttentionConfig | None, ...] = (
    None,
    AttentionConfig(64, 64, 4, 2),
    AttentionConfig(64, 128, 4, 2),
    AttentionConfig(128, 64, 8, 3),
)
Layer = tuple[PackedAttention, PackedFFN]


def _name(config: Any) -> str:
    return "table" if config is None else "-".join(map(str, astuple(config)))


def _time(
    recorder: Recorder,
    device: str,
    section: str,
    case: str,
    calls: dict[str, Callable[[], Tensor]],
    plain: Tensor,
    truth: Tensor,
    flops: float,
) -> None:
    """Check every variant, then time those that pass against each other."""
    variants: dict[str, Variant] = {}
    for name, call in calls.items():
        with recorder.guarded(section, case, peer=name):
            variant = graphed([call], device, fall_back=False)
            variant.run()
            assert_as_accurate(name, variant.output, plain, truth)
            variants[name] = variant
    for name, timing in measure(variants, device, samples=9, max_s=1.5).items():
        recorder.add(section, case, timing=timing, flops=flops, ceiling_of="bf16", peer=name)


def _plain_product(
    form: Form, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: str
) -> Tensor:
    if form == "columns":
        assert residual is not None
        return torch.addmm(bias, x, weight) + residual
    product = F.linear(x, weight, bias)
    return F.gelu(product) if activation == "gelu" else product


def _our_product(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    activation: str,
    config: LinearConfig | None,
) -> Tensor:
    options: dict[str, Any] = {"activation": activation, "residual": residual, "config": config}
    out = launch.linear(form, x, weight, bias, **options)
    if out.dim() == 3:
        assert residual is not None
        # Partial sums; in the op the row norm adds them.
        out = (out.sum(0) + bias + residual).to(x.dtype)
    return out


def sweep_products(
    recorder: Recorder, device: str, dtype: torch.dtype, subnet: Subnet, tokens: int
) -> None:
    """Every product of a layer with its epilogue but for LayerNorm, beside PyTorch's calls."""
    g = subnet.geometry
    inner, neurons = subnet.num_heads * g.head_dim, subnet.intermediate_size
    draw = partial(random_hidden, dtype=dtype, device=device)
    products: list[tuple[str, Form, int, int, str]] = [
        ("qkv", "rows", 3 * inner, g.hidden_size, "none"),
        ("up", "rows", neurons, g.hidden_size, "gelu"),
        ("out", "columns", g.hidden_size, inner, "none"),
        ("down", "columns", g.hidden_size, neurons, "none"),
    ]
    for kind, form, outputs, inputs, activation in products:
        x = draw(tokens, inputs)
        weight = draw(outputs, inputs, seed=1) * inputs**-0.5
        weight = weight.t().contiguous() if form == "columns" else weight
        bias = draw(1, outputs, seed=2)[0]
        residual = draw(tokens, outputs, seed=3) if form == "columns" else None
        plain = partial(_plain_product, form, x, weight, bias, residual, activation)
        ours = partial(_our_product, form, x, weight, bias, residual, activation)
        calls: dict[str, Callable[[], Tensor]] = {"pytorch": plain}
        for config in SMALL if tokens <= SMALL_BATCH else LARGE:
            calls[_name(config)] = partial(ours, config)
        wide = (x.double(), weight.double(), bias.double())
        truth = _plain_product(
            form, *wide, None if residual is None else residual.double(), activation
        )
        case = f"{kind} {g.name} T{tokens} w{subnet.width:g}"
        flops = 2.0 * tokens * outputs * inputs
        _time(recorder, device, "gemm", case, calls, plain(), truth, flops)


def sweep_attention(
    recorder: Recorder, device: str, dtype: torch.dtype, subnet: Subnet, lengths: list[int]
) -> None:
    """The attention core alone, beside one SDPA call per distinct batch of equal lengths."""
    heads, head_dim = subnet.num_heads, subnet.geometry.head_dim
    tokens, longest = sum(lengths), max(lengths)
    qkv = random_hidden(tokens, heads * 3 * head_dim, dtype=dtype, device=device)
    qkv = qkv.view(tokens, heads, 3, head_dim)
    offsets = offsets_of(lengths, device)
    equal = min(lengths) == longest

    def plain(qkv: Tensor) -> Tensor:
        pieces = (
            [qkv.unflatten(0, (-1, longest))] if equal else [p[None] for p in qkv.split(lengths)]
        )
        contexts = (
            F.scaled_dot_product_attention(*piece.permute(3, 0, 2, 1, 4)) for piece in pieces
        )
        return torch.cat([context.transpose(1, 2).flatten(0, 1) for context in contexts])

    calls: dict[str, Callable[[], Tensor]] = {
        _name(config): partial(launch.attention_core, qkv, offsets, longest, config=config)
        for config in CORES
    }
    if equal:
        calls["pytorch"] = partial(plain, qkv)
    case = f"B{len(lengths)} S{longest} H{heads} D{head_dim} {'equal' if equal else 'ragged'}"
    flops = float(sum(4 * n * n * heads * head_dim for n in lengths))
    _time(recorder, device, "attention", case, calls, plain(qkv), plain(qkv.double()), flops)


def random_layers(geometry: Geometry, device: str, dtype: torch.dtype) -> list[Layer]:
    """Packed weights of every layer."""
    g = geometry
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    return [
        (
            random_attention(g.num_heads, g.head_dim, g.hidden_size, seed=layer, **options),
            random_ffn(g.intermediate_size, g.hidden_size, seed=layer, **options),
        )
        for layer in range(g.num_layers)
    ]


def time_encoder(
    recorder: Recorder, device: str, layers: list[Layer], subnet: Subnet, lengths: list[int]
) -> None:
    """The layers of a subnet through both ops, in one graph, on `triton` and on the reference."""
    kept = [layers[index] for index in subnet.layers]
    offsets = offsets_of(lengths, device)
    dtype = layers[0][1].up_weight.dtype
    hidden = random_hidden(sum(lengths), subnet.geometry.hidden_size, device=device, dtype=dtype)

    def encode(hidden: Tensor, kept: list[Layer], backend: str) -> Tensor:
        with use_backend(backend):
            for for_heads, for_neurons in kept:
                hidden = attention(
                    hidden,
                    for_heads,
                    num_heads=subnet.num_heads,
                    cu_seqlens=offsets,
                    max_seqlen=max(lengths),
                )
                hidden = ffn(hidden, for_neurons, intermediate_size=subnet.intermediate_size)
        return hidden

    wide = [(converted(a, torch.float64), converted(f, torch.float64)) for a, f in kept]
    plain = encode(hidden, kept, "reference")
    truth = encode(hidden.double(), wide, "reference")
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(encode, hidden, kept, name) for name in ("triton", "reference")
    }
    case = f"B{len(lengths)} S{max(lengths)} T{sum(lengths)} {subnet.name}"
    flops = float(subnet.ragged_flops(lengths))
    _time(recorder, device, "encoder", case, calls, plain, truth, flops)


def run(
    recorder: Recorder,
    deadline: Deadline,
    device: str,
    dtype: torch.dtype,
    geometry: Geometry,
    batches: list[list[int]],
) -> None:
    """Every section, what matters most first, until the time is up."""
    heat_up(device)
    layers = random_layers(geometry, device, dtype)
    subnets = [Subnet(geometry, width, depth) for width, depth in SUBNETS]
    full, quarter = subnets[:2]
    work: list[tuple[str, Callable[[], None]]] = [
        ("encoder", partial(time_encoder, recorder, device, layers, subnet, lengths))
        for lengths, subnet in itertools.product(batches, (full, quarter))
    ]
    for lengths, subnet in itertools.product(batches, (full, quarter)):
        tokens = sum(lengths)
        work.append(("gemm", partial(sweep_products, recorder, device, dtype, subnet, tokens)))
        work.append(
            ("attention", partial(sweep_attention, recorder, device, dtype, subnet, lengths))
        )
    work += [
        ("encoder", partial(time_encoder, recorder, device, layers, subnet, batches[0]))
        for subnet in subnets[2:]
    ]
    with torch.no_grad():
        for section, measurement in work:
            if deadline.left_s() <= 0:
                recorder.add(section, "cut short", error=f"{deadline.spent_s():.0f} s are spent")
                return
            with recorder.guarded(section, "set-up"):
                measurement()


def main() -> None:
    """Measure BERT-base on the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=240)
    options = parser.parse_args()
    recorder = Recorder(options.out, describe_machine("cuda"))
    recorder.path = options.out / "gpu_triton.jsonl"
    batches = [[128] * 128, [128], [128] * 8, short_text_lengths(512, 128), [512] * 32]
    run(recorder, Deadline(options.budget_s), "cuda", torch.bfloat16, BASE, batches)
    timed = [row for row in recorder.rows if "median_ms" in row]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        name: lambda row, name=name: str(row[name])  # type: ignore[misc]
        for name in ("section", "case", "peer")
    }
    print(format_table(timed, columns | {"ms": lambda row: f"{row['median_ms']:.4f}"}))
    for row in recorder.rows:
        if "error" in row:
            print(f"{row['section']} {row['case']} {row.get('peer', '')}: {row['error']}")


if __name__ == "__main__":
    main()
