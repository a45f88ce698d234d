from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention

from dynabert_kernels import PackedAttention, attention
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    extracted,
    nan_tails,
    random_attention,
    random_hidden,
    random_lengths,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of

OP = ATTENTION
HEADS, HEAD_DIM, HIDDEN = 5, 32, 72
LENGTHS = {
    "equal": [7, 7, 7],
    "one": [1],
    "ragged": [5, 1, 63, 9],
    "empty_ones": [0, 5, 0, 0, 3, 0],
    "all_empty": [0, 0],
    "no_sequence": [],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(hidden, weights, num_heads, lengths, skip_head=None, see_all=False, out_scale=1.0):
    """Equation by equation, one sequence and one head at a time."""
    rows, start = [], 0
    for length in lengths:
        tokens = hidden[start : start + length]
        keys = hidden if see_all else tokens
        start += length
        total = weights.out_bias.expand(length, -1)
        for head in range(num_heads):
            if head == skip_head:
                continue
            (w_q, w_k, w_v), (b_q, b_k, b_v) = weights.qkv_weight[head], weights.qkv_bias[head]
            query = torch.einsum("tc,dc->td", tokens, w_q) + b_q
            key = torch.einsum("tc,dc->td", keys, w_k) + b_k
            value = torch.einsum("tc,dc->td", keys, w_v) + b_v
            score = torch.einsum("qd,kd->qk", query, key) / math.sqrt(weights.head_dim)
            weight = score.exp() / score.exp().sum(1, keepdim=True)
            context = torch.einsum("qk,kd->qd", weight, value)
            total = total + torch.einsum("qd,dc->qc", context, weights.out_weight[head])
        summed = total * out_scale + tokens
        centred = summed - summed.mean(1, keepdim=True)
        deviation = (centred.square().mean(1, keepdim=True) + weights.norm_eps).sqrt()
        rows.append(centred / deviation * weights.norm_weight + weights.norm_bias)
    return torch.cat(rows) if rows else hidden


def plain(hidden, weights, num_heads, lengths):
    """What anyone would write in PyTorch, in the dtype of `hidden`."""
    roles = {k: v.to(hidden.dtype) for k, v in weights.prefix(num_heads).to_hf().items()}
    rows = []
    for tokens in hidden.split(lengths):
        query, key, value = (
            F.linear(tokens, roles[f"{name}_weight"], roles[f"{name}_bias"])
            .unflatten(-1, (num_heads, -1))
            .transpose(0, 1)[None]
            for name in ("query", "key", "value")
        )
        context = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)
        projected = F.linear(context, roles["out_weight"], roles["out_bias"]) + tokens
        norm = (roles["norm_weight"], roles["norm_bias"], weights.norm_eps)
        rows.append(F.layer_norm(projected, (weights.hidden_size,), *norm))
    return torch.cat(rows) if rows else hidden


def run(backend, hidden, weights, num_heads, lengths, **more):
    if isinstance(num_heads, list):
        num_heads = torch.tensor(num_heads, dtype=torch.int32)
    offsets = offsets_of(lengths, hidden.device)
    more = {"max_seqlen": max(lengths, default=0)} | more
    return backend(attention, hidden, weights, num_heads=num_heads, cu_seqlens=offsets, **more)


def inputs(backend, lengths, dtype=torch.float32, heads=HEADS):
    hidden = random_hidden(sum(lengths), HIDDEN, dtype=dtype, device=backend.device, seed=1)
    return hidden, random_attention(heads, HEAD_DIM, HIDDEN, dtype=dtype, device=backend.device)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("heads", [3, 1, HEADS], ids="h{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_pytorch(backend, dtype, heads, lengths):
    hidden, weights = inputs(backend, lengths, dtype)
    with torch.no_grad():
        actual = run(backend, hidden, weights, heads, lengths)
    truth = naive(hidden.double(), converted(weights, torch.float64), heads, lengths)
    assert_as_accurate("output", actual, plain(hidden, weights, heads, lengths), truth)


@pytest.mark.parametrize("lengths", [[7, 7], [5, 0, 11]], ids=["equal", "ragged"])
@pytest.mark.parametrize("heads", [2, HEADS], ids="h{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_as_accurate_as_pytorch(backend, dtype, heads, lengths):
    hidden, weights = inputs(backend, lengths, dtype)
    upstream = random_hidden(*hidden.shape, dtype=dtype, device=backend.device, seed=2)

    def gradients(function, dtype):
        tokens = hidden.detach().to(dtype).requires_grad_()
        leaves = converted(weights, dtype, requires_grad=True)
        function(tokens, leaves, heads, lengths).backward(upstream.to(dtype))
        return {"hidden": tokens.grad, **{n: t.grad for n, t in tensors_of(leaves).items()}}

    actual = gradients(lambda *args: run(backend, *args), dtype)
    simple, truth = gradients(plain, dtype), gradients(naive, torch.float64)
    for name in truth:
        assert_as_accurate(f"gradient of {name}", actual[name], simple[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "mutation",
    [{"skip_head": 0}, {"skip_head": 2}, {"see_all": True}, {"out_scale": 1.01}],
    ids=["first_head_dropped", "last_head_dropped", "mask_ignored", "projection_scaled"],
)
def test_the_tolerance_rejects_a_wrong_kernel(dtype, mutation):
    if dtype == torch.bfloat16 and "out_scale" in mutation:
        # Under the residual and LayerNorm, 1% of the projection is less than bfloat16's own error.
        mutation = {"out_scale": 1.05}
    lengths = [5, 1, 13]
    hidden = random_hidden(19, HIDDEN, dtype=dtype, seed=1)
    weights = random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=dtype)
    double = hidden.double(), converted(weights, torch.float64)
    truth = naive(*double, 3, lengths)
    wrong = naive(*double, 3, lengths, **mutation).to(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate("mutant", wrong, plain(hidden, weights, 3, lengths), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerance_rejects_a_scaled_result(dtype):
    hidden = random_hidden(19, HIDDEN, dtype=dtype, seed=1)
    weights = random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=dtype)
    truth = naive(hidden.double(), converted(weights, torch.float64), 3, [19])
    baseline = plain(hidden, weights, 3, [19])
    assert_as_accurate("right", truth.to(dtype), baseline, truth)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate("scaled", (truth * 1.01).to(dtype), baseline, truth)
    with pytest.raises(AssertionError, match="NaN"):
        poisoned = truth.to(dtype).masked_fill(truth == truth[0, 0], torch.nan)
        assert_as_accurate("poisoned", poisoned, baseline, truth)


@pytest.mark.parametrize("heads", [4, 1, HEADS], ids="h{}".format)
def test_prefix_equals_the_extracted_sublayer(backend, heads):
    hidden, weights = inputs(backend, [5, 9])
    with torch.no_grad():
        inside = run(backend, hidden, weights, heads, [5, 9])
        alone = run(backend, hidden, extracted(weights, heads), heads, [5, 9])
    assert torch.equal(inside, alone)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("lengths", [[7, 7], [5, 9]], ids=["equal", "ragged"])
def test_nan_beyond_the_prefix_changes_no_bit(backend, dtype, lengths):
    hidden, weights = inputs(backend, lengths, dtype)
    with torch.no_grad():
        for heads in range(1, HEADS):
            clean = run(backend, hidden, weights, heads, lengths)
            poisoned = run(backend, hidden, nan_tails(weights, heads), heads, lengths)
            assert torch.equal(clean, poisoned)


def test_rewiring_at_full_width_changes_nothing(backend):
    hidden, weights = inputs(backend, [5, 9])
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        before = run(backend, hidden, weights, HEADS, [5, 9])
        after = run(backend, hidden, weights.permuted(order), HEADS, [5, 9])
    torch.testing.assert_close(after, before)


def test_same_input_same_bits(backend):
    hidden, weights = inputs(backend, [5, 63, 9])
    with torch.no_grad():
        first = run(backend, hidden, weights, 3, [5, 63, 9])
        assert all(
            torch.equal(run(backend, hidden, weights, 3, [5, 63, 9]), first)
            for _ in range(backend.repeats)
        )


def test_ragged_equals_padded_on_real_tokens(backend):
    lengths = [5, 1, 9]
    hidden, weights = inputs(backend, lengths)
    padded = torch.zeros(3, 9, HIDDEN, device=backend.device)
    real = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    padded[real] = hidden
    with torch.no_grad():
        ragged = run(backend, hidden, weights, 3, lengths)
        dense = attention(
            padded.flatten(0, 1),
            weights,
            num_heads=3,
            cu_seqlens=offsets_of([9] * 3, backend.device),
            max_seqlen=9,
            attn_mask=real[:, None, None].to(backend.device),
        )
    torch.testing.assert_close(ragged, dense.view(3, 9, HIDDEN)[real])


@pytest.mark.parametrize("lengths", [[7, 7], [5, 9]], ids=["equal", "ragged"])
def test_max_seqlen_may_be_more_than_needed(backend, lengths):
    hidden, weights = inputs(backend, lengths)
    with torch.no_grad():
        tight = run(backend, hidden, weights, 3, lengths)
        loose = run(backend, hidden, weights, 3, lengths, max_seqlen=20)
    torch.testing.assert_close(loose, tight)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [5, 2, 9]], ids=["equal", "ragged"])
def test_nan_in_a_sequence_stays_in_it(backend, lengths):
    hidden, weights = inputs(backend, lengths)
    own = slice(lengths[0], lengths[0] + lengths[1])
    poisoned = hidden.clone()
    poisoned[own] = torch.nan
    with torch.no_grad():
        clean = run(backend, hidden, weights, 3, lengths)
        dirty = run(backend, poisoned, weights, 3, lengths)
    assert dirty[own].isnan().all()
    others = torch.ones(len(hidden), dtype=torch.bool)
    others[own] = False
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize(
    "widths", [[1, 5, 3, 5], [5, 5, 3, 1], [2, 2, 2, 2]], ids=["mixed", "sorted", "same"]
)
def test_each_sequence_has_its_width(backend, widths):
    lengths = [5, 9, 0, 7]
    hidden, weights = inputs(backend, lengths)
    with torch.no_grad():
        together = run(backend, hidden, weights, widths, lengths)
        alone = [
            run(backend, part, weights, width, [len(part)])
            for part, width in zip(hidden.split(lengths), widths, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_sequence_meets_no_weight_beyond_its_width(backend):
    hidden, weights = inputs(backend, [5, 9, 7])
    with torch.no_grad():
        clean = run(backend, hidden, weights, [3, 5, 2], [5, 9, 7])
        dirty = run(backend, hidden, nan_tails(weights, 3), [3, 5, 2], [5, 9, 7])
    assert dirty[5:14].isnan().all()
    assert torch.equal(dirty[:5], clean[:5])
    assert torch.equal(dirty[14:], clean[14:])


@pytest.mark.parametrize("widths", [[3, 5, 1], [5, 3, 3]], ids=["mixed", "sorted"])
def test_gradients_of_mixed_widths_are_the_sum_of_each(backend, widths):
    lengths = [5, 9, 7]
    hidden, weights = inputs(backend, lengths)
    upstream = random_hidden(*hidden.shape, device=backend.device, seed=2)
    mixed_hidden = hidden.clone().requires_grad_()
    mixed = converted(weights, requires_grad=True)
    run(backend, mixed_hidden, mixed, widths, lengths).backward(upstream)
    apart_hidden = hidden.clone().requires_grad_()
    apart = converted(weights, requires_grad=True)
    parts = zip(apart_hidden.split(lengths), upstream.split(lengths), widths, strict=True)
    for part, gradient, width in parts:
        run(backend, part, apart, width, [len(part)]).backward(gradient)
    torch.testing.assert_close(mixed_hidden.grad, apart_hidden.grad)
    for name, tensor in tensors_of(mixed).items():
        torch.testing.assert_close(tensor.grad, getattr(apart, name).grad, msg=name)


def test_gradients_with_empty_sequences_are_finite(backend):
    lengths = [0, 3, 0]
    hidden, weights = inputs(backend, lengths)
    leaves = converted(weights, requires_grad=True)
    tokens = hidden.requires_grad_()
    run(backend, tokens, leaves, 2, lengths).sum().backward()
    assert tokens.grad.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in tensors_of(leaves).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_serve_half_precision_tokens(backend, dtype):
    hidden, weights = inputs(backend, [5, 9])
    with torch.no_grad():
        mixed = run(backend, hidden.to(dtype), weights, 3, [5, 9])
        same = run(backend, hidden.to(dtype), converted(weights, dtype), 3, [5, 9])
    truth = naive(hidden.to(dtype).double(), converted(weights, torch.float64), 3, [5, 9])
    assert mixed.dtype == dtype
    assert_as_accurate("mixed dtypes", mixed, same, truth, factor=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_sets_the_dtype_of_the_products(backend, dtype):
    hidden, weights = inputs(backend, [5, 9])
    tokens = hidden.to(dtype)
    with torch.autocast(backend.device, torch.bfloat16), torch.no_grad():
        actual = run(backend, tokens, weights, 3, [5, 9])
    assert actual.dtype == dtype
    half = plain(tokens.bfloat16(), converted(weights, torch.bfloat16), 3, [5, 9])
    truth = naive(tokens.double(), converted(weights, torch.float64), 3, [5, 9])
    assert_as_accurate("autocast", actual.bfloat16(), half, truth)
    if dtype == torch.float32:
        exact = run(backend, tokens, weights, 3, [5, 9])
        assert not torch.allclose(actual, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("offset", [1, 3])
def test_strided_and_offset_inputs(backend, offset):
    hidden, weights = inputs(backend, [5, 9])
    storage = torch.full((14, HIDDEN + 7), torch.nan, device=backend.device)
    strided = storage[:, offset : offset + HIDDEN]
    strided.copy_(hidden)
    expanded = replace(weights, out_bias=weights.out_bias[:1].expand(HIDDEN))
    with torch.no_grad():
        actual = run(backend, strided, expanded, 3, [5, 9])
        copied = replace(expanded, out_bias=expanded.out_bias.clone())
        torch.testing.assert_close(actual, run(backend, hidden, copied, 3, [5, 9]))


@pytest.mark.parametrize("masked", [False, True], ids=["equal", "padded"])
def test_full_width_equals_bert(masked):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=72,
        num_attention_heads=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    layer = BertAttention(config).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inner, out = layer.self, layer.output
    weights = PackedAttention.from_hf(
        **{
            f"{name}_{kind}": getattr(getattr(inner, name), kind)
            for name in ("query", "key", "value")
            for kind in ("weight", "bias")
        },
        out_weight=out.dense.weight,
        out_bias=out.dense.bias,
        norm_weight=out.LayerNorm.weight,
        norm_bias=out.LayerNorm.bias,
        num_heads=6,
        norm_eps=config.layer_norm_eps,
    )
    lengths = [9, 4, 6] if masked else [9, 9, 9]
    padded = torch.randn(3, 9, 72)
    real = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    added = torch.zeros(3, 1, 9, 9).masked_fill(~real[:, None, None], torch.finfo().min)
    with torch.no_grad():
        expected = layer(padded, attention_mask=added)[0][real]
        actual = attention(
            padded[real], weights, num_heads=6, cu_seqlens=offsets_of(lengths), max_seqlen=9
        )
    assert (actual - expected).abs().max() < 1e-5


class TestMask:
    LENGTHS = (6, 6)

    def run(self, mask, heads=3, **more):
        hidden = random_hidden(12, HIDDEN, seed=1)
        weights = random_attention(HEADS, HEAD_DIM, HIDDEN)
        offsets = offsets_of(self.LENGTHS)
        arguments = {"num_heads": heads, "cu_seqlens": offsets, "max_seqlen": 6} | more
        return attention(hidden, weights, attn_mask=mask, **arguments)

    def test_causal_mask_equals_growing_sequences(self):
        causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
        hidden = random_hidden(12, HIDDEN, seed=1)
        weights = random_attention(HEADS, HEAD_DIM, HIDDEN)
        masked = self.run(causal)
        for length in range(1, 7):
            alone = attention(
                hidden[:length],
                weights,
                num_heads=3,
                cu_seqlens=offsets_of([length]),
                max_seqlen=length,
            )
            torch.testing.assert_close(masked[length - 1], alone[-1])

    @pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min], ids=str)
    def test_bool_and_additive_masks_agree(self, lowest):
        seen = torch.rand(2, 1, 6, 6) > 0.3
        added = torch.zeros(2, 1, 6, 6).masked_fill(~seen, lowest)
        torch.testing.assert_close(self.run(seen), self.run(added))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["bool", "inf", "lowest"])
    def test_a_query_that_sees_nothing_gets_a_zero_context(self, kind, dtype):
        seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
        seen[0, :, 2] = False
        lowest = -torch.inf if kind == "inf" else torch.finfo(torch.float32).min
        added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
        hidden = random_hidden(12, HIDDEN, dtype=dtype, seed=1).requires_grad_()
        weights = random_attention(HEADS, HEAD_DIM, HIDDEN, dtype=dtype)
        result = attention(
            hidden,
            weights,
            num_heads=3,
            cu_seqlens=offsets_of(self.LENGTHS),
            max_seqlen=6,
            attn_mask=seen if kind == "bool" else added,
        )
        blind = hidden[2].float() + weights.out_bias.float()
        norm = (weights.norm_weight.float(), weights.norm_bias.float(), weights.norm_eps)
        expected = F.layer_norm(blind, (HIDDEN,), *norm).to(dtype)
        torch.testing.assert_close(result[2], expected)
        result.sum().backward()
        assert hidden.grad.isfinite().all()

    def test_one_mask_per_head_is_a_prefix_too(self):
        seen = torch.rand(2, HEADS, 6, 6) > 0.3
        torch.testing.assert_close(self.run(seen), self.run(seen[:, :3]))

    @pytest.mark.parametrize("widths", [[3, 1], [1, 3]], ids=str)
    def test_widths_per_sequence_take_their_rows_of_the_mask(self, widths):
        seen = torch.rand(2, HEADS, 6, 6) > 0.3
        mixed = self.run(seen, heads=torch.tensor(widths, dtype=torch.int32))
        for row, width in enumerate(widths):
            tokens = slice(6 * row, 6 * row + 6)
            torch.testing.assert_close(mixed[tokens], self.run(seen, heads=width)[tokens])


@pytest.mark.parametrize("lengths", [[3, 3], [2, 4]], ids=["equal", "ragged"])
def test_gradcheck_in_float64(lengths):
    weights = random_attention(3, 4, 5, dtype=torch.float64)
    hidden = random_hidden(6, 5, dtype=torch.float64, seed=1).requires_grad_()
    names = list(tensors_of(weights))
    leaves = tensors_of(converted(weights, requires_grad=True)).values()

    def function(tokens, *tensors):
        changed = replace(weights, **dict(zip(names, tensors, strict=True)))
        offsets = offsets_of(lengths)
        return attention(tokens, changed, num_heads=2, cu_seqlens=offsets, max_seqlen=4)

    assert torch.autograd.gradcheck(function, (hidden, *leaves), fast_mode=True)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(2, 12)),
    lengths=st.lists(st.integers(0, 9), max_size=5),
    data=st.data(),
)
def test_any_shape_equals_the_equations(sizes, lengths, data):
    weights = random_attention(*sizes, dtype=torch.float64)
    hidden = random_hidden(sum(lengths), sizes[2], dtype=torch.float64, seed=1)
    widths = [data.draw(st.integers(1, sizes[0])) for _ in lengths]
    actual = attention(
        hidden,
        weights,
        num_heads=torch.tensor(widths, dtype=torch.int32),
        cu_seqlens=offsets_of(lengths),
        max_seqlen=max(lengths, default=0) + data.draw(st.integers(0, 2)),
    )
    parts = zip(hidden.split(lengths), widths, strict=True)
    expected = [naive(part, weights, width, [len(part)]) for part, width in parts]
    torch.testing.assert_close(actual, torch.cat(expected) if expected else hidden)


def test_random_lengths_hold_the_longest():
    lengths = random_lengths(6, 9, seed=3)
    assert len(lengths) == 6 and max(lengths) == 9 and min(lengths) >= 1


def test_threads_with_their_own_widths_do_not_disturb_each_other():
    hidden = random_hidden(19, HIDDEN, seed=1)
    weights = random_attention(HEADS, HEAD_DIM, HIDDEN)
    arguments = {"cu_seqlens": offsets_of([5, 1, 13]), "max_seqlen": 13}

    def call(width):
        with torch.no_grad():
            return attention(hidden, weights, num_heads=width, **arguments)

    alone = {width: call(width) for width in range(1, HEADS + 1)}
    widths = random.Random(0).choices(range(1, HEADS + 1), k=400)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, widths))
    wrong = [w for w, result in zip(widths, results, strict=True) if not result.equal(alone[w])]
    assert wrong == []
