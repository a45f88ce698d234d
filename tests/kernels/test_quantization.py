"""The int8 form of both ops, against loops that follow its definition number by number."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from dynabert_kernels import attention, ffn, use_backend
from dynabert_kernels.ops.attention._reference import Int8Attention
from dynabert_kernels.ops.ffn._reference import Int8FFN
from dynabert_kernels.quantization import (
    NEURON_GROUP,
    integer_product,
    quantize_channels,
    quantize_rows,
    spread,
    spread_factor,
)
from dynabert_kernels.testing import (
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.triton.availability import DEVICE
from dynabert_kernels.varlen import offsets_of

HEADS, HEAD_DIM, HIDDEN = 3, 8, 32  # the fewest channels that are mixed
NEURONS = NEURON_GROUP + 44  # a whole group and a part of one
HEAD_WEIGHTS = replace(random_attention(HEADS, HEAD_DIM, HIDDEN), quantization="int8")
NEURON_WEIGHTS = replace(random_ffn(NEURONS, HIDDEN), quantization="int8")
LENGTHS = [5, 1, 3]


@pytest.fixture(autouse=True)
def the_definition():
    with use_backend("reference"), torch.no_grad():
        yield


def run_attention(hidden, weights=HEAD_WEIGHTS, heads=HEADS, lengths=LENGTHS, **more):
    offsets = offsets_of(lengths, hidden.device)
    return attention(
        hidden, weights, num_heads=heads, cu_seqlens=offsets, max_seqlen=max(lengths), **more
    )


def run_ffn(hidden, weights=NEURON_WEIGHTS, neurons=NEURONS, **more):
    return ffn(hidden, weights, intermediate_size=neurons, **more)


def single(value):
    """A number rounded to float32, as a Python float."""
    return struct.unpack("f", struct.pack("f", value))[0]


def whole(value):
    """Python rounds half to even too."""
    return max(-127, min(127, round(value)))


def loop_scale(numbers):
    return single(max(abs(n) for n in numbers) / 127) or 1.0


def loop_dot(token, row, row_scale):
    """One output of a product: token and row as lists, the row with a scale of its own."""
    largest = max(abs(n) for n in token)
    if largest == 0:
        return 0.0
    inverse = single(127 / largest)
    total = sum(
        whole(single(x * inverse)) * whole(single(w / row_scale))
        for x, w in zip(token, row, strict=True)
    )
    return total * single(largest / 127) * row_scale


def loop_spread(numbers):
    """Each channel with those 16, 32, .. apart in its block, by the signs of Hadamard's matrix."""
    block = math.gcd(len(numbers), 256)
    if block < 32:
        return numbers
    mixed = []
    for c in range(len(numbers)):
        place, start = c % block // 16, c // block * block + c % 16
        signs = [(-1) ** (place & other).bit_count() for other in range(block // 16)]
        mixed.append(single(sum(s * numbers[start + 16 * i] for i, s in enumerate(signs))))
    return mixed


def loop_row(row):
    """A row of weights that meets a spread token."""
    factor = max(1, math.gcd(len(row), 256) // 16)
    return [x / factor for x in loop_spread(row)]


def loop_norm(total, weights):
    mean = sum(total) / len(total)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in total) / len(total) + weights.norm_eps)
    scale, shift = weights.norm_weight.tolist(), weights.norm_bias.tolist()
    return [(x - mean) / deviation * a + b for x, a, b in zip(total, scale, shift, strict=True)]


def loop_ffn(hidden, weights, neurons):
    up, bias = [loop_row(row) for row in weights.up_weight.tolist()], weights.up_bias.tolist()
    down, down_bias = weights.down_weight.tolist(), weights.down_bias.tolist()
    channels = range(weights.hidden_size)
    scales = [loop_scale([row[c] for row in down]) for c in channels]
    rows = []
    for token in hidden.tolist():
        inner, mixed = [], loop_spread(token)
        for n in range(neurons):
            value = loop_dot(mixed, up[n], loop_scale(up[n])) + bias[n]
            inner.append(single(0.5 * value * (1 + math.erf(value / math.sqrt(2)))))
        total = list(map(sum, zip(token, down_bias, strict=True)))
        for start in range(0, neurons, NEURON_GROUP):
            stop = min(neurons, start + NEURON_GROUP)
            for c in channels:
                column = [down[n][c] for n in range(start, stop)]
                total[c] += loop_dot(inner[start:stop], column, scales[c])
        rows.append(loop_norm(total, weights))
    return torch.tensor(rows)


def loop_attention(hidden, weights, heads, lengths):
    bias = weights.qkv_bias.tolist()
    qkv = [[[loop_row(row) for row in part] for part in h] for h in weights.qkv_weight.tolist()]
    out = weights.out_weight.flatten(0, 1).tolist()
    channels = range(weights.hidden_size)
    scales = [loop_scale([row[c] for row in out]) for c in channels]
    projected = [
        [
            [
                [
                    loop_dot(token, qkv[h][part][d], loop_scale(qkv[h][part][d])) + bias[h][part][d]
                    for d in range(HEAD_DIM)
                ]
                for part in range(3)
            ]
            for h in range(heads)
        ]
        for token in map(loop_spread, hidden.tolist())
    ]
    parts = torch.tensor(projected)  # [T, H, 3, D]
    contexts = []
    for sequence in parts.split(lengths):
        query, key, value = sequence.permute(2, 1, 0, 3).unbind(0)
        probabilities = (query @ key.mT * HEAD_DIM**-0.5).softmax(-1)
        contexts.append((probabilities @ value).transpose(0, 1).flatten(1))
    rows = []
    for token, context in zip(hidden.tolist(), torch.cat(contexts).tolist(), strict=True):
        total = [
            token[c]
            + weights.out_bias[c].item()
            + loop_dot(context, [row[c] for row in out[: len(context)]], scales[c])
            for c in channels
        ]
        rows.append(loop_norm(total, weights))
    return torch.tensor(rows)


def assert_follows(actual, expected):
    """Equal but for the order of float32 operations and a number that these round across a half."""
    assert (actual - expected).abs().max() < 2e-2
    assert (actual - expected).abs().median() < 2e-6


@pytest.mark.parametrize("neurons", [1, 37, NEURON_GROUP, NEURONS], ids="i{}".format)
def test_ffn_follows_its_definition(neurons):
    hidden = random_hidden(4, HIDDEN, seed=1)
    hidden[2] = 0
    assert_follows(run_ffn(hidden, neurons=neurons), loop_ffn(hidden, NEURON_WEIGHTS, neurons))


@pytest.mark.parametrize("heads", [1, HEADS], ids="h{}".format)
def test_attention_follows_its_definition(heads):
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    hidden[2] = 0
    expected = loop_attention(hidden, HEAD_WEIGHTS, heads, LENGTHS)
    assert_follows(run_attention(hidden, heads=heads), expected)


def test_errors_against_float_are_small():
    hidden = random_hidden(64, 256, seed=1)
    heads, neurons = random_attention(4, 64, 256), random_ffn(1024, 256)
    for function, weights in (
        (lambda w: run_attention(hidden, w, 4, [64]), heads),
        (lambda w: run_ffn(hidden, w, 1024), neurons),
    ):
        exact = function(weights)
        error = (function(replace(weights, quantization="int8")) - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.04


def test_every_width_reads_the_same_integers_and_scales():
    heads, neurons = Int8Attention.of(HEAD_WEIGHTS), Int8FFN.of(NEURON_WEIGHTS)
    for width in (1, 2):
        assert torch.equal(heads.prefix(width).out.scales, heads.out.scales)
        assert torch.equal(heads.prefix(width).qkv.values, heads.qkv.values[:width])
    for width in (1, 37, NEURON_GROUP + 1):
        assert torch.equal(neurons.prefix(width).down.scales, neurons.down.scales)
        assert torch.equal(neurons.prefix(width).down.values, neurons.down.values[:width])


def test_scales_of_the_second_product_come_from_all_rows():
    louder = NEURON_WEIGHTS.down_weight.clone()
    louder[-1] *= 50
    hidden = random_hidden(4, HIDDEN, seed=1)
    changed = replace(NEURON_WEIGHTS, down_weight=louder)
    assert not torch.equal(run_ffn(hidden, changed, 37), run_ffn(hidden, neurons=37))
    louder = HEAD_WEIGHTS.out_weight.clone()
    louder[-1] *= 50
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    changed = replace(HEAD_WEIGHTS, out_weight=louder)
    assert not torch.equal(run_attention(hidden, changed, 1), run_attention(hidden, heads=1))


def test_one_width_per_sequence_equals_each_alone():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    heads, neurons = torch.tensor([1, 3, 2]).int(), torch.tensor([300, 7, 260]).int()
    offsets = offsets_of(LENGTHS)
    mixed_heads = run_attention(hidden, heads=heads)
    mixed_neurons = run_ffn(hidden, neurons=neurons, cu_seqlens=offsets)
    for row, tokens in enumerate(hidden.split(LENGTHS)):
        place = slice(offsets[row], offsets[row + 1])
        alone = run_attention(tokens, heads=int(heads[row]), lengths=[len(tokens)])
        torch.testing.assert_close(mixed_heads[place], alone)
        torch.testing.assert_close(mixed_neurons[place], run_ffn(tokens, neurons=int(neurons[row])))


SIZES = [7, 16, 24, 32, 48, 64, 96, 200, 256, 384, 768, 1024]


@pytest.mark.parametrize("channels", SIZES, ids="c{}".format)
def test_channels_are_mixed_by_a_hadamard_transform(channels):
    numbers = torch.randn(3, channels, generator=torch.Generator().manual_seed(0))
    mixed = spread(numbers)
    expected = torch.tensor([loop_spread(row) for row in numbers.tolist()])
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=0)
    # Orthogonal but for a factor: so weights spread in the same way give the same product.
    torch.testing.assert_close(spread(mixed), numbers * spread_factor(channels))
    other = torch.randn(channels, generator=torch.Generator().manual_seed(1))
    product = mixed @ spread(other) / spread_factor(channels)
    torch.testing.assert_close(product, numbers @ other)


def test_large_channels_cost_less_once_spread():
    generator = torch.Generator().manual_seed(0)
    tokens, weight = (torch.randn(64, 768, generator=generator) for _ in range(2))
    tokens[:, [5, 400]] *= 30
    exact = tokens.double() @ weight.double().T
    plain = quantize_channels("weight", weight.T)
    as_it_is = integer_product(tokens, plain.values) * plain.scales
    rows = quantize_rows("weight", weight)
    mixed = integer_product(spread(tokens), rows.values.T) * rows.scales
    assert (mixed - exact).norm() < 0.4 * (as_it_is - exact).norm()


def test_products_are_exact_integers():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (3000, 5), generator=generator)
    tokens = torch.randint(-127, 128, (4, 3000), generator=generator)
    tokens[:, 0] = 127  # so that a token's scale is 1
    product = integer_product(tokens.float(), values.float())
    assert torch.equal(product.long(), tokens @ values)


def test_rounds_half_to_even_and_stays_in_range():
    row = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0]])
    assert quantize_rows("row", row).values.tolist() == [[127, 0, 2, -2, -127]]
    assert quantize_rows("row", row).scales.tolist() == [1.0]
    tiny = torch.tensor([[1e-44, 0.0, -1e-44]])
    assert quantize_rows("row", tiny).values.abs().max() <= 127


def test_numbers_without_magnitude_are_zero():
    nothing = torch.zeros(2, 3)
    for quantized in (quantize_rows("rows", nothing), quantize_channels("rows", nothing)):
        assert quantized.values.count_nonzero() == 0
        assert bool((quantized.scales == 1).all())
    tokens = torch.tensor([[0.0, 0.0], [1e-40, 0.0]])
    product = integer_product(tokens, torch.tensor([[127.0], [127.0]]))
    assert product[0].item() == 0
    assert 0 <= product[1].item() < 1e-36


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_tokens_are_converted_and_come_back(dtype):
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1).to(dtype)
    for function in (run_ffn, run_attention):
        actual = function(hidden)
        assert actual.dtype == dtype
        assert torch.equal(actual, function(hidden.float()).to(dtype))


def test_autocast_leaves_integers_as_they_are():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    for function in (run_ffn, run_attention):
        expected = function(hidden)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(hidden), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_weights_that_are_not_finite_are_refused(value):
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    for function, weights, names in (
        (run_attention, HEAD_WEIGHTS, ("qkv_weight", "out_weight")),
        (run_ffn, NEURON_WEIGHTS, ("up_weight", "down_weight")),
    ):
        for name in names:
            broken = tensors_of(weights)[name].clone()
            broken.view(-1)[-1] = value
            with pytest.raises(ValueError, match=rf"^quantization: {name} holds NaN or infinity, "):
                function(hidden, replace(weights, **{name: broken}))


def test_a_tail_that_is_not_finite_is_refused_too():
    with pytest.raises(ValueError, match="up_weight holds NaN"):
        run_ffn(random_hidden(2, HIDDEN), nan_tails(NEURON_WEIGHTS, 5), 5)


def test_gradients_are_refused():
    hidden = random_hidden(sum(LENGTHS), HIDDEN, seed=1)
    trained = converted(NEURON_WEIGHTS, requires_grad=True)
    message = r"gradients are needed and the weights have quantization='int8', expected None\. Call"
    with torch.enable_grad():
        with pytest.raises(NotImplementedError, match=rf"^ffn: {message}"):
            run_ffn(hidden, trained)
        with pytest.raises(NotImplementedError, match=rf"^attention: {message}"):
            run_attention(hidden.clone().requires_grad_())
        assert run_ffn(hidden).isfinite().all()
    assert run_ffn(hidden, trained).isfinite().all()


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
def test_triton_refuses_integers():
    heads = replace(random_attention(2, 32, 64), quantization="int8")
    neurons = replace(random_ffn(8, 64), quantization="int8")
    hidden = random_hidden(5, 64).to(DEVICE)
    refused = "  triton: the weights have quantization='int8', which is not implemented"
    for function in (
        lambda: run_attention(hidden, converted(heads, device=hidden.device), 2, [5]),
        lambda: run_ffn(hidden, converted(neurons, device=hidden.device), 8),
    ):
        with use_backend("triton"), pytest.raises(NotImplementedError, match=refused):
            function()


def test_masks_and_dropout_work_in_integers():
    hidden = random_hidden(6, HIDDEN, seed=1)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    expected = run_attention(hidden, lengths=[6])
    assert torch.equal(run_attention(hidden, lengths=[6], attn_mask=mask), expected)
    dropped = run_ffn(hidden, dropout_p=0.5, seed=3)
    assert torch.equal(dropped, run_ffn(hidden, dropout_p=0.5, seed=3))
    assert not torch.equal(dropped, run_ffn(hidden))


def test_compiles_to_one_graph():
    def layer(hidden):
        return run_ffn(run_attention(hidden, lengths=[6]))

    hidden = random_hidden(6, HIDDEN, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), layer(hidden))
    torch.compiler.reset()


def test_activation_is_that_of_the_weights():
    hidden = random_hidden(4, HIDDEN, seed=1)
    weights = replace(NEURON_WEIGHTS, activation="relu", norm_eps=1e-5)
    up = F.relu(hidden @ weights.up_weight.T + weights.up_bias)
    total = up @ weights.down_weight + weights.down_bias + hidden
    exact = F.layer_norm(total, (HIDDEN,), weights.norm_weight, weights.norm_bias, 1e-5)
    assert (run_ffn(hidden, weights) - exact).norm() / exact.norm() < 0.04
