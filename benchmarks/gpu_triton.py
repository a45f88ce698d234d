"""Triton kernels on a GPU: configurations swept and timed beside PyTorch, and a whole encoder.

    python -m benchmarks.gpu_triton --out DIR [--budget-s 240]

Rows go to DIR/gpu_triton.jsonl as they are taken. Nothing is timed that fails the tests' tolerance
against float64; such a case is a row with its error. `pytest tests/kernels -k triton` on the card
comes first: it holds the correctness, of which this is only the gate.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from dynabert_kernels.triton.configs import SMALL_BATCH, AttentionConfig, LinearConfig
from dynabert_kernels.triton.launch_attention import attention_core, attention_core_gradient
from dynabert_kernels.triton.launch_gemm import columns_product, rows_gradient, rows_product
from dynabert_kernels.varlen import offsets_of

# Beside the table's own choice, which is None. What needs more shared memory than a card has, with
# a residual say, is a row with that error.
LARGE: tuple[LinearConfig | None, ...] = (
    None,
    LinearConfig(128, 128, 64, 8, 3, descriptors=True),
    LinearConfig(128, 128, 64, 8, 3, descriptors=True, subtiles=2, persistent=2),
    LinearConfig(128, 256, 64, 8, 3, descriptors=True, subtiles=2, persistent=1),
    LinearConfig(128, 64, 64, 4, 4, descriptors=True, persistent=2),
)
SMALL: tuple[LinearConfig | None, ...] = (
    None,
    LinearConfig(64, 32, 128, 4, 4),
    LinearConfig(64, 64, 128, 4, 4),
    LinearConfig(64, 32, 128, 4, 4, descriptors=True),
    LinearConfig(64, 32, 128, 4, 4, split_k=2),
)
CORES: tuple[AttentionConfig | None, ...] = (
    None,
    AttentionConfig(64, 64, 4, 3),
    AttentionConfig(64, 128, 4, 1),
    AttentionConfig(128, 64, 8, 3, max_registers=128),
    AttentionConfig(128, 128, 8, 2, heads=3, max_registers=128),
)
GRADIENTS: tuple[AttentionConfig | None, ...] = (
    None,
    AttentionConfig(32, 64, 4, 2),
    AttentionConfig(64, 64, 4, 2),
    AttentionConfig(64, 128, 8, 1),
    AttentionConfig(32, 128, 8, 1, max_registers=128),
)
Layer = tuple[PackedAttention, PackedFFN]
Draw = Callable[..., Tensor]


def _name(config: Any) -> str:
    if config is None:
        return "table"
    return "-".join(str(value) for value in astuple(config) if value is not None)


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


class _Product(NamedTuple):
    """One product of a layer, forward or backward, on random matrices.

    Attributes:
        ours: The kernel in a configuration; None is the table's own.
        plain: The same in PyTorch's calls, of what `inputs` holds.
        inputs: What is drawn, in the order of `plain`.
        flops: Of the product alone.
    """

    ours: Callable[[LinearConfig | None], Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    flops: float


def _rows(draw: Draw, tokens: int, outputs: int, inputs: int, activation: str) -> _Product:
    x, weight = draw(tokens, inputs), draw(outputs, inputs, seed=1) * inputs**-0.5
    bias = draw(1, outputs, seed=2)[0]

    def ours(config: LinearConfig | None) -> Tensor:
        out = rows_product(x, weight, bias, width=outputs, activation=activation, config=config)
        assert isinstance(out, Tensor)
        return out

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = F.linear(x, weight, bias)
        return F.gelu(product) if activation == "gelu" else product

    return _Product(ours, plain, (x, weight, bias), 2.0 * tokens * outputs * inputs)


def _columns(draw: Draw, tokens: int, outputs: int, inputs: int) -> _Product:
    x, weight = draw(tokens, inputs), draw(inputs, outputs, seed=1) * inputs**-0.5
    bias, residual = draw(1, outputs, seed=2)[0], draw(tokens, outputs, seed=3)

    def ours(config: LinearConfig | None) -> Tensor:
        out = columns_product(x, weight, width=inputs, bias=bias, residual=residual, config=config)
        # Partial sums; in the op the row norm adds them.
        return out if out.dim() == 2 else (out.sum(0) + bias + residual).to(x.dtype)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight) + residual

    return _Product(ours, plain, (x, weight, bias, residual), 2.0 * tokens * outputs * inputs)


def _gradient(draw: Draw, tokens: int, outputs: int, inputs: int) -> _Product:
    gradient, weight = draw(tokens, inputs), draw(outputs, inputs, seed=1) * inputs**-0.5
    before = draw(tokens, outputs, seed=2)

    def ours(config: LinearConfig | None) -> Tensor:
        options: dict[str, Any] = {"width": outputs, "activation": "gelu", "config": config}
        return rows_gradient(gradient, weight, before, **options)[0]

    def plain(gradient: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(gradient @ weight.T, before)

    return _Product(ours, plain, (gradient, weight, before), 2.0 * tokens * outputs * inputs)


def sweep_products(
    recorder: Recorder, device: str, dtype: torch.dtype, subnet: Subnet, tokens: int
) -> None:
    """Every product of a layer with its epilogue but for LayerNorm, beside PyTorch's calls.

    With more than a small batch's tokens also the backward ones that have no forward like.
    """
    g = subnet.geometry
    hidden, inner, neurons = g.hidden_size, subnet.num_heads * g.head_dim, subnet.intermediate_size
    draw = partial(random_hidden, dtype=dtype, device=device)
    products: dict[str, Callable[[], _Product]] = {
        "qkv": partial(_rows, draw, tokens, 3 * inner, hidden, "none"),
        "up": partial(_rows, draw, tokens, neurons, hidden, "gelu"),
        "out": partial(_columns, draw, tokens, hidden, inner),
        "down": partial(_columns, draw, tokens, hidden, neurons),
    }
    if tokens > SMALL_BATCH:
        products["d before"] = partial(_gradient, draw, tokens, neurons, hidden)
        products["d hidden"] = partial(_columns, draw, tokens, hidden, 3 * inner)
    for kind, make in products.items():
        product = make()
        plain = partial(product.plain, *product.inputs)
        calls: dict[str, Callable[[], Tensor]] = {"pytorch": plain}
        for config in SMALL if tokens <= SMALL_BATCH else LARGE:
            if config is not None and config.split_k > 1 and kind not in ("out", "down"):
                continue
            calls[_name(config)] = partial(product.ours, config)
        truth = product.plain(*(tensor.double() for tensor in product.inputs))
        case = f"{kind} {g.name} T{tokens} w{subnet.width:g}"
        _time(recorder, device, "gemm", case, calls, plain(), truth, product.flops)


def sweep_attention(
    recorder: Recorder, device: str, dtype: torch.dtype, subnet: Subnet, lengths: list[int]
) -> None:
    """The attention core, forward beside one SDPA call for equal lengths, and backward."""
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

    def plain_gradient(qkv: Tensor, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            qkv = qkv.detach().requires_grad_()
            return torch.autograd.grad(plain(qkv), qkv, gradient)[0]

    place: dict[str, Any] = {"num_heads": heads}
    core: Callable[..., Any] = partial(attention_core, qkv, offsets, longest, **place)
    calls: dict[str, Callable[[], Tensor]] = {
        _name(config): partial(core, config=config) for config in CORES
    }
    if equal:
        calls["pytorch"] = partial(plain, qkv)
    case = f"B{len(lengths)} S{longest} H{heads} D{head_dim} {'equal' if equal else 'ragged'}"
    flops = float(sum(4 * n * n * heads * head_dim for n in lengths))
    _time(recorder, device, "attention", case, calls, plain(qkv), plain(qkv.double()), flops)
    context, log_sum = core(keep_log_sum=True)
    gradient = random_hidden(tokens, heads * head_dim, dtype=dtype, device=device, seed=1)
    gradient = gradient.view(tokens, heads, head_dim)
    backward = partial(
        attention_core_gradient, gradient, qkv, context, log_sum, offsets, longest, **place
    )
    calls = {_name(config): partial(backward, config=config) for config in GRADIENTS}
    truth = plain_gradient(qkv.double(), gradient.double())
    by_pytorch = plain_gradient(qkv, gradient)
    _time(recorder, device, "attention gradient", case, calls, by_pytorch, truth, 2.5 * flops)


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
