"""The rules by which backend `triton` is chosen and refuses, and a layer of a real model's size."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env, attention, ffn, use_backend
from dynabert_kernels.doctor import doctor_report
from dynabert_kernels.ops import _op
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.triton import availability, launch_norm
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _env.triton_interpret(), reason="TRITON_INTERPRET is not set"
)


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """Fresh memory holds NaN, and NumPy computes with NaN in silence."""
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [3, 12], ids="h{}".format)
@pytest.mark.parametrize("lengths", [[128], [128, 7, 63, 1, 128]], ids=["one", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_bert_base(dtype, lengths, heads):
    hidden = random_hidden(sum(lengths), 768, dtype=dtype, device=DEVICE)
    for_heads = random_attention(12, 64, 768, dtype=dtype, device=DEVICE)
    for_neurons = random_ffn(3072, 768, dtype=dtype, device=DEVICE)
    offsets = offsets_of(lengths, DEVICE)

    def layer(hidden, for_heads, for_neurons):
        middle = attention(
            hidden, for_heads, num_heads=heads, cu_seqlens=offsets, max_seqlen=max(lengths)
        )
        return ffn(middle, for_neurons, intermediate_size=heads * 256)

    with torch.no_grad():
        plain = layer(hidden, for_heads, for_neurons)
        wide = (converted(w, torch.float64) for w in (for_heads, for_neurons))
        truth = layer(hidden.double(), *wide)
        with use_backend("triton"):
            actual = layer(hidden, nan_tails(for_heads, heads), nan_tails(for_neurons, heads * 256))
    assert_as_accurate("layer", actual, plain, truth)


def call_attention(hidden, weights, **more):
    options = {"num_heads": 2, "cu_seqlens": offsets_of([3, 4], DEVICE), "max_seqlen": 4} | more
    return attention(hidden, weights, **options)


def sublayers(dtype=torch.float16, head_dim=32):
    hidden = random_hidden(7, 48, dtype=dtype, device=DEVICE)
    return (
        hidden,
        random_attention(3, head_dim, 48, dtype=dtype, device=DEVICE),
        random_ffn(20, 48, dtype=dtype, device=DEVICE),
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="on a card it is chosen automatically")
def test_only_use_backend_chooses_the_interpreter(monkeypatch):
    monkeypatch.setattr(_op, "_strict", True)
    hidden, for_heads, for_neurons = sublayers(torch.float32)
    backends = [b for op in (ATTENTION, FFN) for b in op.backends if b.name == "triton"]
    assert [b.unproven for b in backends] == [
        "Triton's interpreter is for tests; choose it with use_backend('triton')"
    ] * 2
    called, norm = [], launch_norm.residual_norm
    monkeypatch.setattr(
        launch_norm, "residual_norm", lambda *a, **k: called.append(a) or norm(*a, **k)
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call_attention(hidden, for_heads)
        ffn(hidden, for_neurons, intermediate_size=9)
        assert called == []
        with use_backend("triton"):
            call_attention(hidden, for_heads)
            ffn(hidden, for_neurons, intermediate_size=9)
    assert len(called) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="on a card it is chosen automatically")
def test_doctor_says_that_the_interpreter_is_opt_in():
    assert all(op["triton"] == availability.OPT_IN for op in doctor_report()["ops"].values())
    with use_backend("triton"):
        assert all(op["triton"] is None for op in doctor_report()["ops"].values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "attn_mask given"),
        ({"head_dim": 24}, "head_dim=24, expected one of 32, 64, 80, 128"),
        ({"dtype": torch.float64}, "hidden is torch.float64, expected float16, bfloat16 or"),
        ({"strided": True}, "a weight matrix is not contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_forced_call_it_cannot_run_says_why(change, reason):
    more = dict(change)
    hidden, weights, _ = sublayers(more.pop("dtype", torch.float16), more.pop("head_dim", 32))
    if more.pop("strided", False):
        turned = weights.qkv_weight.transpose(2, 3).contiguous().transpose(2, 3)
        weights = replace(weights, qkv_weight=turned)
    if "attn_mask" in more:
        more |= {"max_seqlen": 7, "cu_seqlens": offsets_of([7], DEVICE)}
        more["attn_mask"] = more["attn_mask"].to(DEVICE)
    with use_backend("triton"), pytest.raises(NotImplementedError) as raised:
        call_attention(hidden, weights, **more)
    assert f"  triton: {reason}" in str(raised.value)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card computes bfloat16 rightly")
def test_the_interpreter_refuses_bfloat16():
    hidden, _, for_neurons = sublayers(torch.bfloat16)
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"interpreter .*bfloat16"):
        ffn(hidden, for_neurons, intermediate_size=3)


def test_compiles_to_one_graph():
    hidden, for_heads, for_neurons = sublayers()

    def layer(hidden, width):
        return ffn(call_attention(hidden, for_heads), for_neurons, intermediate_size=width)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with use_backend("triton"), torch.no_grad():
        for width in (9, 20):
            assert torch.equal(compiled(hidden, width), layer(hidden, width))
    torch.compiler.reset()
