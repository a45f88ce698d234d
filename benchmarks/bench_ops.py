"""Microbenchmarks of the two ops on the CPU: backend, width and dtype against three PyTorch forms.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/bench_ops.py
    python -m pytest benchmarks/bench_ops.py -k "ffn and bfloat16" --benchmark-json FILE

One sublayer of BERT-base on one sequence of 128 tokens. The baselines are PyTorch at full width
(what width saves nothing of), PyTorch slicing Hugging Face's weights at each call, and PyTorch on
weights cut once. A result is held against float64 before its time is taken. `extra_info` has the
rate and its share of this machine's limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_ceilings import KIND_OF_DTYPE, measure_alone
from benchmarks.geometry import BASE, WIDTHS, Subnet, linear_shapes
from benchmarks.records import commit_of_checkout
from dynabert_kernels import PackedAttention, PackedFFN, attention, ffn, use_backend
from dynabert_kernels.ops import OPS
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    random_attention,
    random_ffn,
    random_hidden,
)

SEQ_LEN = 128
BACKENDS = tuple(name for name, _ in OPS["ffn"].status("cpu") if name in ("cpu", "reference"))
BASELINES = ("torch_full", "hf_sliced", "torch_extracted")
DTYPES = ("float32", "bfloat16", "int8")
# int8 against float64, root mean square; a wrong scale gives tenths.
INT8_TOLERANCE = 0.03

Call = Callable[[], Tensor]
HF = dict[str, Tensor]


@dataclass(frozen=True)
class Sublayer:
    """An op on random weights at full size.

    Attributes:
        op: "attention" or "ffn".
        weights: Packed, float32.
        hidden: Tokens, ``[T, C]`` float32.
    """

    op: str
    weights: PackedAttention | PackedFFN
    hidden: Tensor

    def size(self, width: float) -> int:
        """Heads or neurons at a width."""
        return BASE.heads(width) if self.op == "attention" else BASE.neurons(width)

    def ours(self, weights: Any, hidden: Tensor, size: int) -> Tensor:
        """The op on the first `size` heads or neurons."""
        if self.op == "ffn":
            return ffn(hidden, weights, intermediate_size=size)
        offsets = torch.tensor([0, hidden.shape[0]], dtype=torch.int32)
        return attention(
            hidden, weights, num_heads=size, cu_seqlens=offsets, max_seqlen=hidden.shape[0]
        )

    def flops(self, width: float) -> float:
        """Operations at a width, two per multiply-add."""
        shapes = linear_shapes(BASE, width)
        names = ("qkv", "out") if self.op == "attention" else ("ffn_up", "ffn_down")
        products = sum(2 * SEQ_LEN * rows * columns for rows, columns in (shapes[n] for n in names))
        scores = 4 * SEQ_LEN**2 * BASE.heads(width) * BASE.head_dim
        return float(products + (scores if self.op == "attention" else 0))


def make(op: str) -> Sublayer:
    """BERT-base's sublayer."""
    hidden = random_hidden(SEQ_LEN, BASE.hidden_size)
    if op == "ffn":
        return Sublayer(op, random_ffn(BASE.intermediate_size, BASE.hidden_size), hidden)
    weights = random_attention(BASE.num_heads, BASE.head_dim, BASE.hidden_size)
    return Sublayer(op, weights, hidden)


def plain(sublayer: Sublayer, hidden: Tensor, w: HF, size: int | None) -> Tensor:
    """The sublayer in Hugging Face's layout; `size` slices the weights in the call."""
    rows = slice(None) if size is None else slice(size)
    if sublayer.op == "ffn":
        up = F.gelu(F.linear(hidden, w["up_weight"][rows], w["up_bias"][rows]))
        out = F.linear(up, w["down_weight"][:, rows], w["down_bias"])
    else:
        if size is not None:
            rows = slice(size * BASE.head_dim)
        q, k, v = (
            F.linear(hidden, w[f"{part}_weight"][rows], w[f"{part}_bias"][rows])
            .unflatten(1, (-1, BASE.head_dim))
            .transpose(0, 1)
            .unsqueeze(0)
            for part in ("query", "key", "value")
        )
        context = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        out = F.linear(context, w["out_weight"][:, rows], w["out_bias"])
    shape = hidden.shape[1:]
    return F.layer_norm(out + hidden, shape, w["norm_weight"], w["norm_bias"], 1e-12)


def prepared(sublayer: Sublayer, variant: str, width: float, dtype: str) -> Call:
    """What one variant runs; slicing that belongs to the call is in it, copying is not."""
    size = sublayer.size(width)
    floating = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    weights, hidden = converted(sublayer.weights, floating), sublayer.hidden.to(floating)
    if variant in BASELINES:
        kept = weights.prefix(size) if variant == "torch_extracted" else weights
        hf = {name: t.contiguous() for name, t in kept.to_hf().items()}
        in_call = size if variant == "hf_sliced" else None
        return lambda: plain(sublayer, hidden, hf, in_call)
    packed = replace(weights, quantization="int8") if dtype == "int8" else weights
    return lambda: sublayer.ours(packed, hidden, size)


def check(sublayer: Sublayer, call: Call, variant: str, width: float, dtype: str) -> None:
    """The gate: at most twice plain PyTorch's error; int8 within its tolerance.

    Raises:
        AssertionError: The variant computes something else.
    """
    width = 1.0 if variant == "torch_full" else width
    truth_of = replace(sublayer, weights=converted(sublayer.weights, torch.float64))
    with use_backend("reference"):
        truth = truth_of.ours(truth_of.weights, sublayer.hidden.double(), sublayer.size(width))
    actual = call()
    if dtype == "int8":
        error = (actual.double() - truth).norm() / truth.norm()
        assert error <= INT8_TOLERANCE, f"relative error={error:.3g}, expected {INT8_TOLERANCE}"
        return
    baseline = prepared(sublayer, "torch_extracted", width, dtype)()
    assert_as_accurate(variant, actual, baseline, truth)


@pytest.fixture(scope="session")
def peaks() -> dict[str, float]:
    """This machine's limits in units per second; empty where the extension cannot tell."""
    found = measure_alone(torch.get_num_threads(), seconds=0.5)
    return {entry["kind"]: entry["rate"] for entry in found if "rate" in entry}


def _cases() -> list[Any]:
    """Every variant that exists; full-width PyTorch once, PyTorch in the floats it has."""
    return [
        pytest.param(op, variant, width, dtype, id=f"{op}-{variant}-w{width:g}-{dtype}")
        for op in ("attention", "ffn")
        for dtype in DTYPES
        for width in WIDTHS
        for variant in (*BACKENDS, *BASELINES)
        if not (variant == "torch_full" and width != 1.0)
        if not (variant in BASELINES and dtype == "int8")
    ]


@pytest.mark.parametrize(("op", "variant", "width", "dtype"), _cases())
def test_op(
    benchmark: Any, peaks: dict[str, float], op: str, variant: str, width: float, dtype: str
) -> None:
    sublayer = make(op)
    call = prepared(sublayer, variant, width, dtype)
    with use_backend(variant if variant in BACKENDS else None), torch.inference_mode():
        try:
            check(sublayer, call, variant, width, dtype)
        except NotImplementedError as error:
            pytest.skip(str(error))
        benchmark.group = f"{op} {dtype} w{width:g}"
        benchmark(call)
    seconds = benchmark.stats.stats.median if benchmark.stats is not None else None
    benchmark.extra_info.update(
        op=op,
        variant=variant,
        subnet=Subnet(BASE, width, 1.0).name,
        dtype=dtype,
        shape=f"1x{SEQ_LEN}",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=commit_of_checkout(),
    )
    if seconds:
        rate = sublayer.flops(width) / seconds
        benchmark.extra_info["gflops"] = rate / 1e9
        peak = peaks.get(KIND_OF_DTYPE[dtype])
        if peak:
            benchmark.extra_info["share_of_peak"] = rate / peak
