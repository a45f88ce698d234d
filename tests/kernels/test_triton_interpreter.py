"""The Triton kernels one by one, on every path of their launchers, and the rules of the backend.

The properties of the ops themselves are tests/kernels/test_attention.py and test_ffn.py, where
`triton` is one of the backends. Without a GPU all of them run in Triton's interpreter, which shows
that the arithmetic and the addressing are right, and nothing of a card.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env, attention, ffn, use_backend
from dynabert_kernels.doctor import doctor_report
from dynabert_kernels.layout import ACTIVATIONS
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
from dynabert_kernels.triton import availability, configs, launch
from dynabert_kernels.triton.configs import LinearConfig
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly, so that dtype is for cards alone.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
PATHS = {
    "pointers": LinearConfig(64, 32, 32, 4, 2),
    "descriptors": LinearConfig(64, 32, 32, 4, 2, descriptors=True),
    "split2": LinearConfig(64, 32, 32, 4, 2, split_k=2),
    "split8": LinearConfig(64, 32, 32, 4, 2, split_k=8),
}

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


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_accurate(name, actual, function, *inputs):
    """`function` of `inputs` in their own dtype is plain PyTorch, in float64 the truth."""
    truth = function(*(tensor.double() for tensor in inputs))
    assert_as_accurate(name, actual, function(*inputs), truth)


@pytest.mark.parametrize(
    ("form", "path"),
    # The rows form has its own epilogue, so its K is never split.
    [("rows", "pointers"), ("rows", "descriptors"), *(("columns", path) for path in PATHS)],
)
@pytest.mark.parametrize("size", [(1, 8, 8), (63, 40, 200), (130, 96, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype, size, form, path):
    tokens, outputs, inputs = size
    x = normal(tokens, inputs, dtype=dtype, seed=1)
    # What the prefix leaves over, in the same storage, is NaN.
    storage = torch.full((outputs + inputs + 9, max(outputs, inputs)), torch.nan, device=DEVICE)
    weight = storage.to(dtype).flatten()[: outputs * inputs]
    weight.copy_(normal(outputs * inputs, dtype=dtype, seed=2, scale=inputs**-0.5))
    bias, residual = normal(outputs, dtype=dtype), normal(tokens, outputs, dtype=dtype, seed=3)
    if form == "rows":
        actual = launch.linear(form, x, weight.view(outputs, inputs), bias, config=PATHS[path])
        assert_accurate("rows", actual, F.linear, x, weight.view(outputs, inputs), bias)
        return
    weight = weight.view(inputs, outputs)
    actual = launch.linear(form, x, weight, bias, residual=residual, config=PATHS[path])
    if PATHS[path].split_k > 1:
        assert actual.dtype == torch.float32 and len(actual) == PATHS[path].split_k
        actual = (actual.sum(0) + bias + residual).to(dtype)
    assert_accurate(
        "columns", actual, lambda *t: t[0] @ t[1] + t[2] + t[3], x, weight, bias, residual
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", ["pointers", "descriptors"])
def test_activation_at_every_magnitude(path, activation):
    values = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-3e38, -60.0, 60.0, 3e38])])
    x = F.pad(values[:, None], (0, 3)).to(DEVICE)
    one, none = torch.eye(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    actual = launch.linear("rows", x, one, none, activation=activation, config=PATHS[path])
    function = {
        "gelu": F.gelu,
        "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
        "relu": F.relu,
    }[activation]
    torch.testing.assert_close(actual[:, 0].cpu(), function(values.double()).float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_keeps_what_is_not_finite(activation):
    x = torch.tensor([[torch.inf], [torch.nan]], device=DEVICE)
    one, none = torch.ones(1, 1, device=DEVICE), torch.zeros(1, device=DEVICE)
    actual = launch.linear("rows", x, one, none, activation=activation)
    assert actual[0, 0] == torch.inf and actual[1, 0].isnan()


def test_float32_precision_follows_pytorch():
    assert launch.input_precision(torch.float32) == "tf32x3"
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.input_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("channels", [1, 77, 128, 770], ids="c{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_norm(dtype, channels, parts):
    residual = normal(7, channels + 3, dtype=dtype, seed=1)[:, :channels]
    bias, weight, shift = (normal(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    if parts == 1:
        x = total = normal(7, channels, dtype=dtype, seed=5) + 3
    else:
        x = normal(parts, 7, channels, seed=5)
        total = (x.double().sum(0) + bias.double() + residual.double()).to(dtype)
    actual = launch.residual_norm(x, bias, residual, weight, shift, 1e-5)
    norm = lambda t, w, b: F.layer_norm(t, (channels,), w, b, 1e-5)  # noqa: E731
    if parts > 1:
        truth = x.double().sum(0) + bias.double() + residual.double()
        truth = norm(truth, weight.double(), shift.double())
        assert_as_accurate("norm of parts", actual, norm(total, weight, shift), truth)
    else:
        assert_accurate("norm", actual, norm, total, weight, shift)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lengths, id="_".join(map(str, lengths)), marks=marks)
        for lengths, marks in (
            ([7, 0, 16], ()),
            ([129, 5], ()),
            ([1], pytest.mark.slow),
            ([63, 64, 65], pytest.mark.slow),
            ([128, 1, 127], pytest.mark.slow),
            ([0, 200, 33], pytest.mark.slow),
        )
    ],
)
@pytest.mark.parametrize("head_dim", availability.HEAD_DIMS, ids="d{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_core(dtype, head_dim, lengths):
    qkv = normal(sum(lengths), 3, 3, head_dim, dtype=dtype)

    def plain(qkv):
        pieces = (piece.permute(2, 1, 0, 3)[:, None] for piece in qkv.split(lengths))
        return torch.cat([F.scaled_dot_product_attention(*p)[0].transpose(0, 1) for p in pieces])

    actual = launch.attention_core(qkv, offsets_of(lengths, DEVICE), max(lengths))
    assert_accurate("context", actual, plain, qkv)


def test_no_score_overflows():
    qkv = normal(150, 1, 3, 32, scale=40.0)
    context = launch.attention_core(qkv, offsets_of([20, 130], DEVICE), 130)
    assert context.isfinite().all()


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


def test_only_use_backend_chooses_it(monkeypatch):
    monkeypatch.setattr(_op, "_strict", True)
    hidden, for_heads, for_neurons = sublayers(torch.float32)
    backends = [b for op in (ATTENTION, FFN) for b in op.backends if b.name == "triton"]
    assert [b.unproven for b in backends] == [
        "no recorded GPU run proves it yet; choose it with use_backend('triton')"
    ] * 2
    called = []
    monkeypatch.setattr(launch, "residual_norm", lambda *a, **k: called.append(a) or a[2].clone())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call_attention(hidden, for_heads)
        ffn(hidden, for_neurons, intermediate_size=9)
        assert called == []
        with use_backend("triton"):
            call_attention(hidden, for_heads)
            ffn(hidden, for_neurons, intermediate_size=9)
    assert len(called) == 2


def test_doctor_says_that_it_is_opt_in():
    assert all(op["triton"] == availability.UNPROVEN for op in doctor_report()["ops"].values())
    with use_backend("triton"):
        assert all(op["triton"] is None for op in doctor_report()["ops"].values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "dropout is not implemented"),
        ({"attention_dropout_p": 0.1, "seed": 3}, "dropout is not implemented"),
        ({"num_heads": torch.tensor([1, 2], dtype=torch.int32)}, "one width per sequence is given"),
        ({"attn_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "attn_mask given"),
        ({"head_dim": 24}, "head_dim=24, expected one of 32, 64, 80, 128"),
        ({"dtype": torch.float64}, "hidden is torch.float64, expected float16, bfloat16 or"),
        ({"weights": torch.float32}, "the weights are torch.float32 and hidden torch.float16"),
        ({"strided": True}, "a weight matrix is not contiguous"),
        ({"gradients": True}, "it has no backward, and gradients are needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_forced_call_it_cannot_run_says_why(change, reason):
    more = dict(change)
    hidden, weights, _ = sublayers(more.pop("dtype", torch.float16), more.pop("head_dim", 32))
    if "weights" in more:
        weights = converted(weights, more.pop("weights"))
    if more.pop("strided", False):
        turned = weights.qkv_weight.transpose(2, 3).contiguous().transpose(2, 3)
        weights = replace(weights, qkv_weight=turned)
    if more.pop("gradients", False):
        hidden.requires_grad_()
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


@pytest.mark.parametrize("op", [ATTENTION, FFN], ids=lambda op: op.name)
def test_opcheck(op, monkeypatch):
    calls = []
    monkeypatch.setattr(op, "reference", lambda call: calls.append(call) or call.hidden)
    hidden, for_heads, for_neurons = sublayers()
    call_attention(hidden, for_heads)
    ffn(hidden, for_neurons, intermediate_size=9)
    overload = getattr(torch.ops.dynabert, op.name).triton
    torch.library.opcheck(
        overload,
        calls[0].arguments(),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


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


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120], ids="sm{}".format)
def test_small_batches_are_split_to_fill_a_card(capability):
    def config(form, tokens, inputs):
        return configs.linear_config(
            form,
            tokens=tokens,
            outputs=768,
            inputs=inputs,
            dtype=torch.bfloat16,
            capability=capability,
            num_sms=132,
            aligned=True,
        )

    assert config("columns", 128, 3072).split_k == 4
    assert config("columns", 128, 192).split_k == 1
    assert config("rows", 128, 3072).split_k == config("columns", 1024, 3072).split_k == 1
    assert config("columns", 16384, 768).descriptors == (capability == 90)
