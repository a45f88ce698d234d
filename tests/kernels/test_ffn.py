from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

from dynabert_kernels import PackedFFN, ffn
from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    extracted,
    nan_tails,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

OP = FFN
NEURONS, HIDDEN = 150, 72
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activate(value, activation):
    if activation == "relu":
        return value.clamp(min=0)
    if activation == "gelu":
        return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)
    return 0.5 * value * (1 + torch.tanh(inner))


def naive(hidden, weights, neurons, skip_neuron=None, down_scale=1.0):
    """Equation by equation."""
    up = torch.einsum("tc,ic->ti", hidden, weights.up_weight[:neurons]) + weights.up_bias[:neurons]
    active = activate(up, weights.activation)
    if skip_neuron is not None:
        active[:, skip_neuron] = 0
    down = torch.einsum("ti,ic->tc", active, weights.down_weight[:neurons]) + weights.down_bias
    summed = down * down_scale + hidden
    centred = summed - summed.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + weights.norm_eps).sqrt()
    return centred / deviation * weights.norm_weight + weights.norm_bias


def plain(hidden, weights, neurons):
    """What anyone would write in PyTorch, in the dtype of `hidden`."""
    roles = {k: v.to(hidden.dtype) for k, v in weights.prefix(neurons).to_hf().items()}
    up = F.linear(hidden, roles["up_weight"], roles["up_bias"])
    active = {
        "gelu": F.gelu,
        "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
        "relu": F.relu,
    }[weights.activation](up)
    down = F.linear(active, roles["down_weight"], roles["down_bias"]) + hidden
    norm = (roles["norm_weight"], roles["norm_bias"], weights.norm_eps)
    return F.layer_norm(down, (weights.hidden_size,), *norm)


def run(backend, hidden, weights, neurons, **more):
    return backend(ffn, hidden, weights, intermediate_size=neurons, **more)


def inputs(backend, tokens, dtype=torch.float32, activation="gelu"):
    hidden = random_hidden(tokens, HIDDEN, dtype=dtype, device=backend.device, seed=1)
    options = {"dtype": dtype, "device": backend.device, "activation": activation}
    return hidden, random_ffn(NEURONS, HIDDEN, **options)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [7, 0, 1, 63], ids="t{}".format)
@pytest.mark.parametrize("neurons", [37, 1, NEURONS], ids="i{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_pytorch(backend, dtype, neurons, tokens, activation):
    hidden, weights = inputs(backend, tokens, dtype, activation)
    with torch.no_grad():
        actual = run(backend, hidden, weights, neurons)
    truth = naive(hidden.double(), converted(weights, torch.float64), neurons)
    assert_as_accurate("output", actual, plain(hidden, weights, neurons), truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("neurons", [37, NEURONS], ids="i{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_accurate_as_pytorch(backend, dtype, neurons, activation):
    hidden, weights = inputs(backend, 23, dtype, activation)
    upstream = random_hidden(23, HIDDEN, dtype=dtype, device=backend.device, seed=2)

    def gradients(function, dtype):
        tokens = hidden.detach().to(dtype).requires_grad_()
        leaves = converted(weights, dtype, requires_grad=True)
        function(tokens, leaves, neurons).backward(upstream.to(dtype))
        return {"hidden": tokens.grad, **{n: t.grad for n, t in tensors_of(leaves).items()}}

    actual = gradients(lambda *args: run(backend, *args), dtype)
    simple, truth = gradients(plain, dtype), gradients(naive, torch.float64)
    for name in truth:
        assert_as_accurate(f"gradient of {name}", actual[name], simple[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutation", [{"skip_neuron": 3}, {"down_scale": 1.01}], ids=str)
def test_the_tolerance_rejects_a_wrong_kernel(dtype, mutation):
    if dtype == torch.bfloat16 and "down_scale" in mutation:
        # Under the residual and LayerNorm, 1% of the projection is less than bfloat16's own error.
        mutation = {"down_scale": 1.05}
    hidden = random_hidden(63, HIDDEN, dtype=dtype, seed=1)
    weights = random_ffn(NEURONS, HIDDEN, dtype=dtype)
    double = hidden.double(), converted(weights, torch.float64)
    wrong = naive(*double, 37, **mutation).to(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate("mutant", wrong, plain(hidden, weights, 37), naive(*double, 37))


@pytest.mark.parametrize("neurons", [37, 1, NEURONS], ids="i{}".format)
def test_prefix_equals_the_extracted_sublayer(backend, neurons):
    hidden, weights = inputs(backend, 7)
    with torch.no_grad():
        inside = run(backend, hidden, weights, neurons)
        alone = run(backend, hidden, extracted(weights, neurons), neurons)
    assert torch.equal(inside, alone)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_beyond_the_prefix_changes_no_bit(backend, dtype):
    hidden, weights = inputs(backend, 7, dtype)
    with torch.no_grad():
        for neurons in (1, 37, NEURONS - 1):
            clean = run(backend, hidden, weights, neurons)
            assert torch.equal(clean, run(backend, hidden, nan_tails(weights, neurons), neurons))


def test_rewiring_at_full_width_changes_nothing(backend):
    hidden, weights = inputs(backend, 7)
    moved = weights.permuted(torch.randperm(NEURONS))
    with torch.no_grad():
        before = run(backend, hidden, weights, NEURONS)
        torch.testing.assert_close(run(backend, hidden, moved, NEURONS), before)


def test_same_input_same_bits(backend):
    hidden, weights = inputs(backend, 63)
    with torch.no_grad():
        first = run(backend, hidden, weights, 37)
        assert all(
            torch.equal(run(backend, hidden, weights, 37), first) for _ in range(backend.repeats)
        )


def test_nan_in_a_token_stays_in_it(backend):
    hidden, weights = inputs(backend, 7)
    poisoned = hidden.clone()
    poisoned[3, 5] = torch.nan
    with torch.no_grad():
        clean, dirty = (run(backend, tokens, weights, 37) for tokens in (hidden, poisoned))
    assert dirty[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("each", [[1, 150, 37, 150], [150, 37, 37, 1]], ids=["mixed", "sorted"])
def test_each_sequence_has_its_width(backend, each):
    lengths = [5, 9, 0, 7]
    hidden, weights = inputs(backend, 21)
    offsets = offsets_of(lengths, backend.device)
    with torch.no_grad():
        together = run(backend, hidden, weights, int32(*each), cu_seqlens=offsets)
        parts = zip(hidden.split(lengths), each, strict=True)
        alone = [run(backend, part, weights, neurons) for part, neurons in parts]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_sequence_meets_no_weight_beyond_its_width(backend):
    hidden, weights = inputs(backend, 21)
    offsets = offsets_of([5, 9, 7], backend.device)
    arguments = (int32(37, 38, 9),)
    with torch.no_grad():
        clean = run(backend, hidden, weights, *arguments, cu_seqlens=offsets)
        dirty = run(backend, hidden, nan_tails(weights, 37), *arguments, cu_seqlens=offsets)
    assert dirty[5:14].isnan().all()
    assert torch.equal(dirty[:5], clean[:5])
    assert torch.equal(dirty[14:], clean[14:])


@pytest.mark.parametrize("each", [[37, 150, 1], [150, 37, 37]], ids=["mixed", "sorted"])
def test_gradients_of_mixed_widths_are_the_sum_of_each(backend, each):
    lengths = [5, 9, 7]
    hidden, weights = inputs(backend, 21)
    upstream = random_hidden(21, HIDDEN, device=backend.device, seed=2)
    mixed_hidden = hidden.clone().requires_grad_()
    mixed = converted(weights, requires_grad=True)
    offsets = offsets_of(lengths, backend.device)
    run(backend, mixed_hidden, mixed, int32(*each), cu_seqlens=offsets).backward(upstream)
    apart_hidden = hidden.clone().requires_grad_()
    apart = converted(weights, requires_grad=True)
    parts = zip(apart_hidden.split(lengths), upstream.split(lengths), each, strict=True)
    for part, gradient, neurons in parts:
        run(backend, part, apart, neurons).backward(gradient)
    torch.testing.assert_close(mixed_hidden.grad, apart_hidden.grad)
    for name, tensor in tensors_of(mixed).items():
        torch.testing.assert_close(tensor.grad, getattr(apart, name).grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_serve_half_precision_tokens(backend, dtype):
    hidden, weights = inputs(backend, 23)
    with torch.no_grad():
        mixed = run(backend, hidden.to(dtype), weights, 37)
        same = run(backend, hidden.to(dtype), converted(weights, dtype), 37)
    truth = naive(hidden.to(dtype).double(), converted(weights, torch.float64), 37)
    assert mixed.dtype == dtype
    assert_as_accurate("mixed dtypes", mixed, same, truth, factor=3)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast_sets_the_dtype_of_the_products(backend, dtype):
    hidden, weights = inputs(backend, 23)
    tokens = hidden.to(dtype)
    with torch.autocast(backend.device, torch.bfloat16), torch.no_grad():
        actual = run(backend, tokens, weights, 37)
    assert actual.dtype == dtype
    half = plain(tokens.bfloat16(), converted(weights, torch.bfloat16), 37)
    truth = naive(tokens.double(), converted(weights, torch.float64), 37)
    assert_as_accurate("autocast", actual.bfloat16(), half, truth)


@pytest.mark.parametrize("offset", [1, 3])
def test_strided_and_offset_inputs(backend, offset):
    hidden, weights = inputs(backend, 7)
    storage = torch.full((7, HIDDEN + 7), torch.nan, device=backend.device)
    strided = storage[:, offset : offset + HIDDEN]
    strided.copy_(hidden)
    expanded = replace(weights, down_bias=weights.down_bias[:1].expand(HIDDEN))
    copied = replace(expanded, down_bias=expanded.down_bias.clone())
    with torch.no_grad():
        actual = run(backend, strided, expanded, 37)
        torch.testing.assert_close(actual, run(backend, hidden, copied, 37))


@pytest.mark.parametrize(
    ("hf_name", "activation"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu")]
)
def test_full_width_equals_bert(hf_name, activation):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=72, intermediate_size=150, hidden_act=hf_name, hidden_dropout_prob=0.0
    )
    up, down = BertIntermediate(config).eval(), BertOutput(config).eval()
    for parameter in (*up.parameters(), *down.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    weights = PackedFFN.from_hf(
        up_weight=up.dense.weight,
        up_bias=up.dense.bias,
        down_weight=down.dense.weight,
        down_bias=down.dense.bias,
        norm_weight=down.LayerNorm.weight,
        norm_bias=down.LayerNorm.bias,
        norm_eps=config.layer_norm_eps,
        activation=activation,
    )
    hidden = torch.randn(27, 72)
    with torch.no_grad():
        actual = ffn(hidden, weights, intermediate_size=150)
        assert (actual - down(up(hidden), hidden)).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck_in_float64(activation):
    weights = random_ffn(6, 5, dtype=torch.float64, activation=activation)
    hidden = random_hidden(4, 5, dtype=torch.float64, seed=1).requires_grad_()
    names = list(tensors_of(weights))
    leaves = tensors_of(converted(weights, requires_grad=True)).values()

    def function(tokens, *tensors):
        changed = replace(weights, **dict(zip(names, tensors, strict=True)))
        return ffn(tokens, changed, intermediate_size=4)

    assert torch.autograd.gradcheck(function, (hidden, *leaves), fast_mode=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(2, 12)),
    lengths=st.lists(st.integers(0, 9), max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    data=st.data(),
)
def test_any_shape_equals_the_equations(sizes, lengths, activation, data):
    weights = random_ffn(*sizes, dtype=torch.float64, activation=activation)
    hidden = random_hidden(sum(lengths), sizes[1], dtype=torch.float64, seed=1)
    each = [data.draw(st.integers(1, sizes[0])) for _ in lengths]
    actual = ffn(hidden, weights, intermediate_size=int32(*each), cu_seqlens=offsets_of(lengths))
    parts = zip(hidden.split(lengths), each, strict=True)
    expected = [naive(part, weights, neurons) for part, neurons in parts]
    torch.testing.assert_close(actual, torch.cat(expected) if expected else hidden)
