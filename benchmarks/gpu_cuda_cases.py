"""The measurements of `gpu_cuda`: products with their epilogues, and the encoder in one launch.

Letters: see `benchmarks.geometry`; n is the outputs or inputs a width leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda_library import ENCODER_TENSORS, CudaLibrary, EncoderShape
from benchmarks.geometry import SUBNETS, WIDTHS, Geometry, Subnet
from benchmarks.gpu_tables import pivot
from benchmarks.gpu_timing import L2Flush, Variant, graphed, measure, relative_error
from benchmarks.records import Deadline, Recorder
from dynabert_kernels.testing import random_attention, random_ffn

EPS = 1e-12
TOKENS = 128 * 128
LENGTHS = (128, 32, 64, 256, 512)
# Buffers that the calls of a graph take in turn: even the narrowest exceed an L2 of 60 MB together.
SETS = 4
CALLS = 8
# What follows a product over a prefix, as the names of its peers say it.
RESIDUAL, NORM = " + residual", " + norm"
# A replay of the eager layers is about a thousand nodes, which the host needs a while to enqueue.
ENCODER_BACKLOG_MS = 0.5

Operands = list[dict[str, Tensor]]
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Attributes:
        call: Computes on the operands of this index.
        truth: What it should return for the last set, float32; None: it is part of a peer that is
            checked.
        plain: PyTorch's result in bfloat16; twice its error is allowed.
    """

    call: Call
    truth: Tensor | None = None
    plain: Tensor | None = None


def check(output: Tensor, truth: Tensor, plain: Tensor) -> float:
    """The relative error.

    Raises:
        AssertionError: It is more than twice that of plain PyTorch, or there is a NaN.
    """
    error, allowed = relative_error(output, truth), 2 * relative_error(plain, truth)
    if not error <= allowed:
        raise AssertionError(f"relative error {error:.2e}, expected at most {allowed:.2e}")
    return error


def _time_product(
    recorder: Recorder, device: str, case: str, subnet: str, flops: float, peers: dict[str, Peer]
) -> None:
    variants: dict[str, Variant] = {}
    errors: dict[str, float] = {}
    for name, peer in peers.items():
        with recorder.guarded("product", case, peer=name, subnet=subnet):
            calls = [partial(peer.call, index) for index in range(CALLS)]
            variant = graphed(calls, device, fall_back=False)
            variant.run()
            if peer.truth is not None and peer.plain is not None:
                errors[name] = check(variant.output, peer.truth, peer.plain)
            variants[name] = variant
    for name, timing in measure(variants, device, samples=11, max_s=0.8).items():
        recorder.add(
            "product",
            case,
            timing=timing,
            flops=flops,
            ceiling_of="bf16",
            peer=name,
            subnet=subnet,
            dtype="bfloat16",
            l2="cold",
            rel_err=errors.get(name),
        )


def time_rows(
    recorder: Recorder,
    library: CudaLibrary,
    device: str,
    case: str,
    sizes: tuple[int, int, int],
    width: float,
) -> None:
    """A product on a prefix of the weight's rows: QKV, or up with GELU.

    Args:
        recorder: Takes the rows.
        library: The kernels.
        device: "cuda" or "cpu".
        case: "qkv" or "up".
        sizes: Tokens, C and all rows of the weight.
        width: Fraction of the rows.
    """
    tokens, hidden, full = sizes
    n, gelu = round(full * width), case == "up"
    draw = partial(torch.randn, device=device)
    sets: Operands = [
        {
            "x": draw(tokens, hidden).bfloat16(),
            "weight": (draw(full, hidden) * hidden**-0.5).bfloat16(),
            "bias": draw(full).bfloat16(),
            "out": torch.full((tokens, n), torch.nan, dtype=torch.bfloat16, device=device),
            "alone": torch.empty((tokens, n), dtype=torch.bfloat16, device=device),
        }
        for _ in range(SETS)
    ]

    def plain(o: dict[str, Tensor]) -> Tensor:
        product = F.linear(o["x"], o["weight"][:n], o["bias"][:n])
        return F.gelu(product) if gelu else product

    def ours(hopper: bool, index: int) -> Tensor:
        o = sets[index % SETS]
        operands = o["x"], o["weight"], o["bias"], o["out"]
        return library.gemm_rows(*operands, width=n, gelu=gelu, hopper=hopper)

    def alone(index: int) -> Tensor:
        o = sets[index % SETS]
        return torch.mm(o["x"], o["weight"][:n].t(), out=o["alone"])

    last = sets[(CALLS - 1) % SETS]
    truth, by_torch = plain({k: v.float() for k, v in last.items()}), plain(last)
    peers = {
        "cuda": Peer(partial(ours, True), truth, by_torch),
        "cuda sm_80": Peer(partial(ours, False), truth, by_torch),
        "pytorch": Peer(lambda index: plain(sets[index % SETS]), truth, by_torch),
        "cublas alone": Peer(alone),
    }
    _time_product(recorder, device, case, f"w{width:g}", 2.0 * tokens * n * hidden, peers)


def time_columns(
    recorder: Recorder,
    library: CudaLibrary,
    device: str,
    case: str,
    sizes: tuple[int, int, int],
    width: float,
) -> None:
    """A product over a prefix of the weight's rows, plus bias; with residual; with both and norm.

    Args:
        recorder: Takes the rows.
        library: The kernels.
        device: "cuda" or "cpu".
        case: "out" or "down".
        sizes: Tokens, C and all rows of the weight.
        width: Fraction of the rows.
    """
    tokens, hidden, full = sizes
    n = round(full * width)
    draw = partial(torch.randn, device=device)
    bias, norm_bias = draw(hidden).bfloat16(), draw(hidden).bfloat16()
    norm_weight = (1 + 0.2 * draw(hidden)).bfloat16()
    # One for all calls: they run one after the other.
    workspace = torch.zeros(library.norm_workspace_bytes(), dtype=torch.uint8, device=device)
    sets: Operands = []
    for _ in range(SETS):
        weight = (draw(full, hidden) * n**-0.5).bfloat16()
        sets.append(
            {
                "x": draw(tokens, n).bfloat16(),
                "weight": weight,
                "dense": weight[:n].t().contiguous(),
                "residual": draw(tokens, hidden).bfloat16(),
            }
        )
        for name in ("out", "out" + RESIDUAL, "out" + NORM, "alone"):
            sets[-1][name] = torch.full_like(sets[-1]["residual"], torch.nan)

    def plain(o: dict[str, Tensor], affine: Sequence[Tensor], after: str) -> Tensor:
        product = F.linear(o["x"], o["dense"], affine[0])
        if not after:
            return product
        total = product + o["residual"]
        return F.layer_norm(total, (hidden,), affine[1], affine[2], EPS) if after == NORM else total

    def ours(after: str, hopper: bool, index: int) -> Tensor:
        o, norm = sets[index % SETS], after == NORM
        return library.gemm_columns(
            o["x"],
            o["weight"],
            bias,
            o["out" + after],
            residual=o["residual"] if after else None,
            norm=(norm_weight, norm_bias) if norm else None,
            workspace=workspace if norm else None,
            eps=EPS,
            hopper=hopper,
        )

    def alone(index: int) -> Tensor:
        o = sets[index % SETS]
        return torch.mm(o["x"], o["weight"][:n], out=o["alone"])

    last, affine = sets[(CALLS - 1) % SETS], (bias, norm_weight, norm_bias)
    wide = {name: tensor.float() for name, tensor in last.items()}
    peers = {"cublas alone": Peer(alone)}
    for after in ("", RESIDUAL, NORM):
        truth = plain(wide, [tensor.float() for tensor in affine], after)
        by_torch = plain(last, affine, after)
        by_pytorch = partial(lambda after, index: plain(sets[index % SETS], affine, after), after)
        peers[f"cuda{after}"] = Peer(partial(ours, after, True), truth, by_torch)
        peers[f"pytorch{after}"] = Peer(by_pytorch, truth, by_torch)
        if not after:
            peers["cuda sm_80"] = Peer(partial(ours, after, False), truth, by_torch)
    _time_product(recorder, device, case, f"w{width:g}", 2.0 * tokens * n * hidden, peers)


class Encoder:
    """A random model for the kernel that runs all layers, its subnet in device memory.

    Args:
        geometry: Sizes.
        device: "cuda" or "cpu".
    """

    def __init__(self, geometry: Geometry, device: str) -> None:
        self.geometry, self.device = geometry, device
        g = geometry
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        self.tensors: list[dict[tuple[str, str], Tensor]] = []
        for layer in range(g.num_layers):
            parts = {
                "attention": random_attention(
                    g.num_heads, g.head_dim, g.hidden_size, seed=layer, **options
                ),
                "ffn": random_ffn(g.intermediate_size, g.hidden_size, seed=layer, **options),
            }
            self.tensors.append(
                {
                    (part, name): getattr(parts[part], name).to(device)
                    for part, name in ENCODER_TENSORS
                }
            )
        self.addresses = torch.tensor(
            [[tensor.data_ptr() for tensor in layer.values()] for layer in self.tensors],
            device=device,
        )
        one = torch.ones(1, dtype=torch.int32, device=device)
        each = torch.ones(g.num_layers, dtype=torch.int32, device=device)
        self.subnet = (one, each, each.clone(), each.clone())

    def choose(self, subnet: Subnet) -> None:
        """Write the layers and widths of a subnet to where captured launches read them."""
        kept, heads, neurons = subnet.layers, subnet.num_heads, subnet.intermediate_size
        for target, values in zip(
            self.subnet,
            ([len(kept)], kept, [heads] * len(kept), [neurons] * len(kept)),
            strict=True,
        ):
            target[: len(values)].copy_(torch.tensor(values, dtype=torch.int32))

    def dense(self, subnet: Subnet, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """The subnet's layers cut out, as `nn.Linear` stores them."""
        heads, neurons = subnet.num_heads, subnet.intermediate_size
        layers = []
        for index in subnet.layers:
            t = {name: tensor.to(dtype) for name, tensor in self.tensors[index].items()}
            layers.append(
                {
                    "qkv": t["attention", "qkv_weight"][:heads].flatten(0, 2).contiguous(),
                    "qkv_bias": t["attention", "qkv_bias"][:heads].flatten().contiguous(),
                    "out": t["attention", "out_weight"][:heads].flatten(0, 1).t().contiguous(),
                    "out_bias": t["attention", "out_bias"],
                    "norm1": t["attention", "norm_weight"],
                    "norm1_bias": t["attention", "norm_bias"],
                    "up": t["ffn", "up_weight"][:neurons].contiguous(),
                    "up_bias": t["ffn", "up_bias"][:neurons].contiguous(),
                    "down": t["ffn", "down_weight"][:neurons].t().contiguous(),
                    "down_bias": t["ffn", "down_bias"],
                    "norm2": t["ffn", "norm_weight"],
                    "norm2_bias": t["ffn", "norm_bias"],
                }
            )
        return layers


def plain_layers(x: Tensor, layers: list[dict[str, Tensor]], head_dim: int) -> Tensor:
    """One sequence through post-norm layers in PyTorch's calls, ``[T, C]`` to ``[T, C]``."""
    tokens, size = x.shape[0], x.shape[1:]
    for w in layers:
        qkv = F.linear(x, w["qkv"], w["qkv_bias"]).view(1, tokens, -1, 3, head_dim)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind()
        context = F.scaled_dot_product_attention(query, key, value)
        context = context.transpose(1, 2).reshape(tokens, -1)
        x = F.linear(context, w["out"], w["out_bias"]) + x
        x = F.layer_norm(x, size, w["norm1"], w["norm1_bias"], EPS)
        inner = F.gelu(F.linear(x, w["up"], w["up_bias"]))
        x = F.linear(inner, w["down"], w["down_bias"]) + x
        x = F.layer_norm(x, size, w["norm2"], w["norm2_bias"], EPS)
    return x


def time_encoder(
    recorder: Recorder,
    library: CudaLibrary,
    encoder: Encoder,
    tokens: int,
    subnets: Sequence[Subnet],
    deadline: Deadline,
) -> None:
    """One sequence at each subnet: one captured launch for all, eager layers captured for each."""
    g, device, case = encoder.geometry, encoder.device, f"1x{tokens}"
    shape = EncoderShape(
        tokens, 1, g.num_layers, g.hidden_size, g.head_dim, g.num_heads, g.intermediate_size
    )
    reason = library.encoder_why_not(shape)
    if reason is not None:
        recorder.add("encoder", case, error=reason, peer="cuda")
        return
    workspace = torch.zeros(
        library.encoder_workspace_bytes(shape), dtype=torch.uint8, device=device
    )
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    inputs = [torch.randn(tokens, g.hidden_size, device=device).bfloat16() for _ in range(SETS)]
    outputs = [torch.full_like(x, torch.nan) for x in inputs]

    def ours(index: int) -> Tensor:
        return library.encoder_forward(
            shape,
            inputs[index % SETS],
            outputs[index % SETS],
            offsets,
            encoder.addresses,
            encoder.subnet,
            workspace,
            EPS,
        )

    def eager_layers(layers: list[dict[str, Tensor]], index: int) -> Tensor:
        return plain_layers(inputs[index % SETS], layers, g.head_dim)

    def captured(call: Call) -> dict[str, Variant]:
        last = partial(call, CALLS - 1)
        return {
            "warm": graphed([partial(call, i) for i in range(CALLS)], device, fall_back=False),
            "cold": graphed([last], device, fall_back=False),
        }

    # Any subnet serves to capture: the launch does not know it.
    encoder.choose(subnets[0])
    our_graphs = captured(ours)
    flush = L2Flush(device)
    for subnet in subnets:
        if deadline.left_s() <= 0:
            recorder.add("encoder", "cut short", error=f"{deadline.spent_s():.0f} s are spent")
            return
        with recorder.guarded("encoder", case, subnet=subnet.name):
            encoder.choose(subnet)
            layers = encoder.dense(subnet, torch.bfloat16)
            x = inputs[(CALLS - 1) % SETS]
            wide = encoder.dense(subnet, torch.float32)
            truth = plain_layers(x.float(), wide, g.head_dim)
            plain = plain_layers(x, layers, g.head_dim)
            peers = {
                "cuda": our_graphs,
                "pytorch graph": captured(partial(eager_layers, layers)),
            }
            errors: dict[str, float] = {}
            for name, graphs in peers.items():
                for graph in graphs.values():
                    for output in outputs:
                        output.fill_(torch.nan)
                    graph.run()
                    errors[name] = check(graph.output, truth, plain)
            for l2, before in (("warm", None), ("cold", flush)):
                timings = measure(
                    {name: graphs[l2] for name, graphs in peers.items()},
                    device,
                    samples=11,
                    max_s=0.5,
                    backlog_ms=ENCODER_BACKLOG_MS,
                    before=before,
                )
                for name, timing in timings.items():
                    recorder.add(
                        "encoder",
                        case,
                        timing=timing,
                        flops=subnet.flops(1, tokens),
                        bytes_moved=subnet.weight_bytes(),
                        peer=name,
                        subnet=subnet.name,
                        dtype="bfloat16",
                        l2=l2,
                        rel_err=errors[name],
                    )


def run(
    recorder: Recorder,
    library: CudaLibrary,
    encoder: Encoder,
    deadline: Deadline,
    tokens: int = TOKENS,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """The encoder at all subnets on the first length, the products, then the other lengths."""
    g = encoder.geometry
    subnets = [Subnet(g, *pair) for pair in SUBNETS]
    products: list[tuple[Callable[..., None], str, int]] = [
        (time_rows, "qkv", 3 * g.num_heads * g.head_dim),
        (time_rows, "up", g.intermediate_size),
        (time_columns, "out", g.num_heads * g.head_dim),
        (time_columns, "down", g.intermediate_size),
    ]
    with torch.no_grad():
        with recorder.guarded("encoder", f"1x{lengths[0]}"):
            time_encoder(recorder, library, encoder, lengths[0], subnets, deadline)
        for time_product, case, full in products:
            for width in WIDTHS:
                if deadline.left_s() <= 0:
                    recorder.add(
                        "product", "cut short", error=f"{deadline.spent_s():.0f} s are spent"
                    )
                    return
                with recorder.guarded("product", case, subnet=f"w{width:g}"):
                    sizes = (tokens, g.hidden_size, full)
                    time_product(recorder, library, encoder.device, case, sizes, width)
        extremes = [Subnet(g, 1.0, 1.0), Subnet(g, 0.25, 0.5)]
        for length in lengths[1:]:
            with recorder.guarded("encoder", f"1x{length}"):
                time_encoder(recorder, library, encoder, length, extremes, deadline)


def tables(rows: list[dict[str, Any]]) -> str:
    """What was measured, in two tables, and each error."""
    products = [row for row in rows if row["section"] == "product"]
    encoders = [row for row in rows if row["section"] == "encoder"]
    errors = [
        f"{row['section']} {row['case']} {row.get('subnet', '')} {row.get('peer', '')}: "
        f"{row['error'][:150]}"
        for row in rows
        if "error" in row
    ]
    parts = [
        "Products, us (TFLOP/s)",
        pivot(
            products,
            lambda row: f"{row['case']} {row['subnet']}",
            lambda row: row["peer"],
            lambda row: f"{row['median_ms'] * 1e3:.1f} ({row['tflops']:.0f})",
        ),
        "Encoder, us",
        pivot(
            encoders,
            lambda row: f"{row['case']} {row['subnet']}",
            lambda row: f"{row['peer']} {row['l2']}",
            lambda row: f"{row['median_ms'] * 1e3:.1f}",
        ),
        f"{len(rows)} rows, {len(errors)} without a timing",
        *errors[:10],
    ]
    return "\n".join(parts)
