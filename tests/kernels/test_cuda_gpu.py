"""Backend `cuda` on a card: against the reference, replayed in graphs, on several streams."""

from __future__ import annotations

import gc

import pytest
import torch

from dynabert_kernels import attention, ffn, proof, use_backend
from dynabert_kernels.ops import _cuda, _cuda_encoder, _self_check, _trust
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.attention import _cuda as cuda_attention
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.ops.ffn import _cuda as cuda_ffn
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.varlen import offsets_of

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
SUBNETS = [(12, 3072), (9, 2304), (6, 1536), (3, 768)]
RAGGED, LONG = [37, 1, 0, 90, 128], [300, 0, 17, 64]
half_types = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])


@pytest.fixture(autouse=True)
def in_force():
    """The backend is; fresh memory holds NaN."""
    if _cuda.cuda_missing() is not None:
        pytest.skip(f"cuda: {_cuda.cuda_missing()}")
    torch.use_deterministic_algorithms(True)
    with use_backend("cuda"):
        yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """A layer of BERT-base, whose weights serve every width."""

    def __init__(self, dtype=torch.bfloat16, head_dim=64, weights_dtype=None):
        options = {"dtype": weights_dtype or dtype, "device": "cuda"}
        self.heads = random_attention(12, head_dim, 768, **options)
        self.neurons = random_ffn(3072, 768, **options)
        self.dtype = dtype

    def tokens(self, lengths, seed=1):
        return random_hidden(sum(lengths), 768, dtype=self.dtype, device="cuda", seed=seed)

    @torch.no_grad()
    def __call__(self, hidden, heads, neurons, offsets, longest):
        middle = attention(
            hidden, self.heads, num_heads=heads, cu_seqlens=offsets, max_seqlen=longest
        )
        return ffn(middle, self.neurons, intermediate_size=neurons, cu_seqlens=offsets)

    def converted(self, dtype):
        other = object.__new__(Layer)
        other.heads, other.neurons = (converted(w, dtype) for w in (self.heads, self.neurons))
        return other

    def narrow(self, heads, neurons):
        other = object.__new__(Layer)
        other.heads = nan_tails(self.heads, heads)
        other.neurons = nan_tails(self.neurons, neurons)
        return other


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def check(layer, actual, hidden, heads, neurons, lengths):
    arguments = (heads, neurons, offsets_of(lengths, "cuda"), max(lengths))
    with use_backend("reference"):
        plain = layer(hidden, *arguments)
        truth = layer.converted(torch.float64)(hidden.double(), *arguments)
    assert_as_accurate("layer", actual, plain, truth)


@pytest.mark.parametrize("lengths", [[1], RAGGED, LONG, [128] * 16], ids=str)
@pytest.mark.parametrize("heads", [12, 5], ids="h{}".format)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128], ids="d{}".format)
@half_types
def test_a_prefix_is_as_accurate_as_pytorch(dtype, head_dim, heads, lengths):
    layer, neurons = Layer(dtype, head_dim), heads * 256 - 7 * (heads < 12)
    hidden, offsets = layer.tokens(lengths), offsets_of(lengths, "cuda")
    actual = layer.narrow(heads, neurons)(hidden, heads, neurons, offsets, max(lengths))
    check(layer, actual, hidden, heads, neurons, lengths)


@pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=["same", "masters"])
@half_types
def test_each_sequence_may_have_a_width(dtype, weights_dtype):
    layer = Layer(dtype, weights_dtype=weights_dtype)
    heads, neurons = int32(3, 12, 1, 7), int32(33, 3072, 5, 1999)
    hidden, offsets = layer.tokens(LONG), offsets_of(LONG, "cuda")
    actual = layer(hidden, heads, neurons, offsets, max(LONG))
    check(layer, actual, hidden, heads, neurons, LONG)


@half_types
def test_float32_weights_under_autocast(dtype):
    layer = Layer(torch.float32)
    hidden, offsets = layer.tokens(RAGGED), offsets_of(RAGGED, "cuda")
    arguments = (5, 1000, offsets, max(RAGGED))
    with torch.autocast("cuda", dtype):
        actual = layer.narrow(5, 1000)(hidden, *arguments)
        with use_backend("reference"):
            plain = layer(hidden, *arguments)
    with use_backend("reference"):
        truth = layer.converted(torch.float64)(hidden.double(), *arguments)
    assert_as_accurate("layer", actual, plain, truth)


def test_every_path_agrees():
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = {"attention": cuda_attention.KERNELS, "ffn": cuda_ffn.KERNELS}
    differing = {}
    for path in proof.all_paths("cuda", proof.capability(device)):
        if path.op == "encoder":
            error = _self_check.encoder_difference(path, device)
        else:
            error = kernels[path.op].check(path, device)
        if error is not None:
            differing[str(path)] = error
    assert differing == {}


def test_a_first_call_checks_its_path(monkeypatch):
    monkeypatch.setattr(_trust, "trusted", set())
    monkeypatch.setattr(_trust, "_agreed", set())
    monkeypatch.setattr(proof, "is_proven", lambda path: False)
    layer = Layer()
    layer(layer.tokens(RAGGED), 12, 3072, offsets_of(RAGGED, "cuda"), max(RAGGED))
    assert {(path.backend, path.op) for path in _trust._agreed} == {
        ("cuda", "attention"),
        ("cuda", "ffn"),
    }


def test_the_automatic_choice_on_hopper_is_this_backend(monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the card is not sm_90")
    layer, ran = Layer(), []
    for op in (ATTENTION, FFN):
        overload = op._overloads["cuda"]
        monkeypatch.setitem(op._overloads, "cuda", lambda *a, o=overload: ran.append(o) or o(*a))
    many = [128] * 32
    with use_backend(None):
        layer(layer.tokens(RAGGED), 12, 3072, offsets_of(RAGGED, "cuda"), max(RAGGED))
        assert ran == []
        layer(layer.tokens(many), 12, 3072, offsets_of(many, "cuda"), max(many))
    assert len(ran) == 2


@pytest.mark.parametrize("each", [False, True], ids=["batch", "sequences"])
@half_types
def test_a_thousand_replays_of_one_graph_equal_eager_calls_at_every_width(dtype, each):
    layer, lengths = Layer(dtype), [100, 128, 28, 64]
    hidden, offsets = layer.tokens(lengths), offsets_of(lengths, "cuda")
    count = len(lengths) if each else 1
    heads, neurons = int32(*[12] * count), int32(*[3072] * count)

    def step():
        return layer(hidden, heads, neurons, offsets, 128)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for num_heads, intermediate_size in SUBNETS:
        heads.fill_(num_heads)
        neurons.fill_(intermediate_size)
        if each:  # the last sequence has one of its own
            heads[-1:].fill_(2)
            neurons[-1:].fill_(99)
        expected = step()
        for _ in range(1000):
            result.fill_(torch.nan)
            graph.replay()
            different += (result != expected).any()
        assert int(different) == 0, (num_heads, intermediate_size)


def on_four_streams(run, count):
    """How often `run(place)`, called `count` times for each place at once, differs from alone."""
    expected = [run(place) for place in range(4)]
    different = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in expected]
    streams = [torch.cuda.Stream() for _ in expected]
    torch.cuda.synchronize()
    for _ in range(count):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                different[place] += (run(place) != expected[place]).any()
    torch.cuda.synchronize()
    return [int(number) for number in different]


# The longer batch fills a card with blocks that wait for each other, on every stream.
@pytest.mark.parametrize("lengths", [[64, 128, 7], [128] * 64], ids=["short", "full"])
@half_types
def test_a_thousand_calls_on_each_of_four_streams(dtype, lengths):
    layer, offsets = Layer(dtype), offsets_of(lengths, "cuda")
    batches = [layer.tokens(lengths, seed=seed) for seed in range(4)]

    def run(place):
        return layer(batches[place], *SUBNETS[place], offsets, 128)

    assert on_four_streams(run, 1000) == [0, 0, 0, 0]


def whole_encoder(layer):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the card is not sm_90")
    return EncoderLayers.of([EncoderLayer(layer.heads, layer.neurons, 12, 3072)] * 4)


@torch.no_grad()
def test_a_thousand_encoders_on_each_of_four_streams():
    layer, lengths = Layer(), [64, 128, 7]
    layers, offsets = whole_encoder(layer), offsets_of(lengths, "cuda")
    batches = [layer.tokens(lengths, seed=seed) for seed in range(4)]

    def run(place):
        return _cuda_encoder.launch(batches[place], layers, offsets)

    assert on_four_streams(run, 1000) == [0, 0, 0, 0]


@torch.no_grad()
def test_a_captured_encoder_needs_nothing_that_the_call_held():
    layer, lengths = Layer(), [64, 128, 7]
    layers, offsets = whole_encoder(layer), offsets_of(lengths, "cuda")
    hidden = layer.tokens(lengths)
    expected = _cuda_encoder.launch(hidden, layers, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _cuda_encoder.launch(hidden, layers, offsets)
    del layers
    gc.collect()
    # What was freed holds other numbers by now.
    spoilt = [torch.full((64,), -1, dtype=torch.int64, device="cuda") for _ in range(1000)]
    graph.replay()
    assert torch.equal(result, expected)
    assert len(spoilt) == 1000


def test_calls_on_a_card_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    last = torch.cuda.device_count() - 1
    layer = Layer()
    hidden = layer.tokens(RAGGED)
    expected = layer(hidden, 12, 3072, offsets_of(RAGGED, "cuda"), 128)
    other = object.__new__(Layer)
    device = torch.device("cuda", last)
    other.heads, other.neurons = (converted(w, device=device) for w in (layer.heads, layer.neurons))
    actual = other(hidden.to(device), 12, 3072, offsets_of(RAGGED, device), 128)
    assert torch.cuda.current_device() != last
    assert torch.equal(actual.to(hidden.device), expected)
