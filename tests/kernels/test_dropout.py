from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynabert_kernels import attention, dropout, ffn, use_backend
from dynabert_kernels.ops import forced_backend
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.varlen import offsets_of

MASK_32 = 0xFFFFFFFF
# Known answers of philox4x32 with 10 rounds, as the Random123 library publishes them.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([MASK_32] * 4, [MASK_32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def philox_int(seed, counter):
    """Philox-4x32-10 in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK_32, seed >> 32
    for _ in range(10):
        b, a = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK_32, (a >> 32) ^ c3 ^ k1, a & MASK_32
        k0, k1 = (k0 + 0x9E3779B9) & MASK_32, (k1 + 0xBB67AE85) & MASK_32
    return [c0, c1, c2, c3]


def uniform_int(word):
    signed = word - 2**32 if word >= 2**31 else word
    scale = torch.tensor(4.6566127342e-10, dtype=torch.float32)
    return (torch.tensor(float(~signed if signed < 0 else signed)) * scale).item()


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = tuple(torch.tensor(word) for word in counter)
    seed = key[0] | key[1] << 32
    assert [word.item() for word in dropout.philox(seed, words)] == answer
    assert philox_int(seed, counter) == answer


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**63 - 1),
    counters=st.lists(st.tuples(*[st.integers(0, MASK_32)] * 4), min_size=1, max_size=5),
)
def test_philox_equals_integer_arithmetic(seed, counters):
    words = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    actual = torch.stack(dropout.philox(seed, words), dim=1).tolist()
    assert actual == [philox_int(seed, counter) for counter in counters]


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3, 2**63 - 1])
def test_rand_uses_both_halves_of_seed_and_offset(seed):
    offsets = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
    expected = [
        uniform_int(philox_int(seed, (offset & MASK_32, offset >> 32, 0, 0))[0])
        for offset in offsets.tolist()
    ]
    assert dropout.rand(seed, offsets).tolist() == expected


def test_uniform_covers_its_range():
    words = torch.tensor([0, 2**31 - 1, 2**31, MASK_32])
    low, high = 0.0, dropout.uniform(words)[1].item()
    assert dropout.uniform(words).tolist() == [low, high, high, low]
    assert 0.999999 < high < 1.0


TRITON_SCRIPT = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def rand_kernel(out_ptr, offset_ptr, seed, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out_ptr + places, tl.rand(seed, tl.load(offset_ptr + places)))

@triton.jit
def philox_kernel(out_ptr, word_ptr, seed, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    c0 = tl.load(word_ptr + places)
    c1 = tl.load(word_ptr + COUNT + places)
    c2 = tl.load(word_ptr + 2 * COUNT + places)
    first, _, _, _ = tl.philox(seed, c0, c1, c2, c0 * 0 + 1)
    tl.store(out_ptr + places, first.to(tl.int64))

given = json.loads(sys.argv[1])
offsets = torch.tensor(given["offsets"])
words = torch.tensor(given["words"], dtype=torch.int32)
out, first = torch.empty(len(offsets)), torch.empty(words.shape[1], dtype=torch.int64)
rand_kernel[(1,)](out, offsets, given["seed"], len(offsets))
philox_kernel[(1,)](first, words, given["seed"], words.shape[1])
print(json.dumps({"rand": out.tolist(), "first": first.tolist()}))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed")
@pytest.mark.parametrize("seed", [3, 2**40 + 3])
def test_bits_equal_triton(tmp_path, seed):
    script = tmp_path / "kernels.py"
    script.write_text(TRITON_SCRIPT, encoding="utf-8")
    offsets = [0, 1, 77, 2**31 + 5, 2**32 - 1, 2**32, 2**33 + 9, 2**50]
    words = torch.randint(0, 2**31 - 1, (3, 8))
    given = json.dumps({"seed": seed, "offsets": offsets, "words": words.tolist()})
    done = subprocess.run(
        [sys.executable, str(script), given],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    triton = json.loads(done.stdout)
    assert dropout.rand(seed, torch.tensor(offsets)).tolist() == triton["rand"]
    first = dropout.philox(seed, (*words, torch.tensor(1)))[0]
    assert first.tolist() == [word & MASK_32 for word in triton["first"]]


def test_hidden_dropout_numbers_elements_by_token_and_channel():
    whole = dropout.hidden_uniform(9, torch.arange(50), 24)
    assert torch.equal(whole.flatten(), dropout.rand(9, torch.arange(50 * 24)))
    some = torch.tensor([40, 3, 17])
    assert torch.equal(dropout.hidden_uniform(9, some, 24), whole[some])


def test_attention_dropout_does_not_know_width_or_padding():
    queries = torch.arange(12).view(2, 6)
    whole = dropout.attention_uniform(9, queries, num_heads=4, num_keys=6)
    assert torch.equal(dropout.attention_uniform(9, queries, 2, 6), whole[:, :2])
    assert torch.equal(dropout.attention_uniform(9, queries, 4, 3), whole[..., :3])
    assert torch.equal(dropout.attention_uniform(9, queries[1:], 4, 6), whole[1:])
    assert whole[0, 2, 3, 5].item() == uniform_int(philox_int(9, (5, 3, 2, 1))[0])


def test_blocks_do_not_show(monkeypatch):
    tokens = torch.arange(30)
    whole = dropout.hidden_uniform(9, tokens, 7)
    monkeypatch.setattr(dropout, "_BLOCK", 20)
    assert torch.equal(dropout.hidden_uniform(9, tokens, 7), whole)


def test_uniform_numbers_look_uniform_and_streams_differ():
    numbers = dropout.hidden_uniform(1, torch.arange(400), 100)
    assert abs(numbers.mean().item() - 0.5) < 0.005
    assert abs((numbers < 0.1).double().mean().item() - 0.1) < 0.005
    other = dropout.hidden_uniform(2, torch.arange(400), 100)
    correlation = torch.corrcoef(torch.stack((numbers.flatten(), other.flatten())))[0, 1]
    assert abs(correlation.item()) < 0.02


def test_philox_op_passes_opcheck():
    for shapes in ([(5,), (5,), (), ()], [(6,), (2, 1, 4, 1), (3, 1, 1), ()], [(0,), (), (), ()]):
        words = [torch.randint(0, 2**32, shape) for shape in shapes]
        torch.library.opcheck(torch.ops.dynabert.philox_word.default, (7, *words))


NEURONS, HEADS, HEAD_DIM, HIDDEN = 20, 4, 32, 12
ON_CARD = torch.cuda.is_available()
# The C++ kernels drop in training alone, which test_cpu_training.py covers.
BACKENDS = {"reference": "cpu", "triton": "cuda" if ON_CARD else "cpu"}


@pytest.fixture(params=BACKENDS)
def device(request):
    """Where a backend runs; it is forced meanwhile."""
    reason = dict(FFN.status(BACKENDS[request.param]))[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield BACKENDS[request.param]


def neurons_on(device, dtype=torch.float32):
    return random_ffn(NEURONS, HIDDEN, device=device, dtype=dtype)


def heads_on(device, dtype=torch.float32):
    return random_attention(HEADS, HEAD_DIM, HIDDEN, device=device, dtype=dtype)


def run_ffn(hidden, weights, seed=3, neurons=9, dropout_p=0.4, **more):
    arguments = {"intermediate_size": neurons, "dropout_p": dropout_p, "seed": seed} | more
    return ffn(hidden, weights, **arguments)


def run_attention(hidden, weights, lengths, seed=3, heads=2, **more):
    offsets = offsets_of(lengths, hidden.device)
    arguments = {"cu_seqlens": offsets, "max_seqlen": max(lengths), "seed": seed}
    return attention(hidden, weights, num_heads=heads, **(arguments | more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ffn_drops_before_the_residual(device, dtype):
    if dtype == torch.bfloat16 and forced_backend() == "triton" and not ON_CARD:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    hidden = random_hidden(11, HIDDEN, dtype=dtype, device=device)
    weights = neurons_on(device, dtype)
    kept = dropout.rand(3, torch.arange(11 * HIDDEN, device=device)).view(11, HIDDEN) > 0.4

    def plain(tokens, weights):
        up = F.gelu(F.linear(tokens, weights.up_weight[:9], weights.up_bias[:9]))
        down = up @ weights.down_weight[:9] + weights.down_bias
        norm = (weights.norm_weight, weights.norm_bias, weights.norm_eps)
        return F.layer_norm(torch.where(kept, down / 0.6, 0) + tokens, (HIDDEN,), *norm)

    truth = plain(hidden.double(), converted(weights, torch.float64))
    assert_as_accurate("output", run_ffn(hidden, weights), plain(hidden, weights), truth)


@pytest.mark.parametrize("lengths", [[4, 4], [5, 3]], ids=["equal", "ragged"])
def test_attention_drops_weights_and_projection(device, lengths):
    hidden, weights = random_hidden(8, HIDDEN, device=device), heads_on(device)
    actual = run_attention(hidden, weights, lengths, dropout_p=0.3, attention_dropout_p=0.4)
    start, rows = 0, []
    for length in lengths:
        tokens = hidden[start : start + length]
        queries = torch.arange(start, start + length, device=device)
        numbers = dropout.attention_uniform(3, queries[None], 2, length)[0]
        projected = weights.out_bias.expand(length, -1)
        for head in range(2):
            query, key, value = (
                tokens @ weights.qkv_weight[head, part].T + weights.qkv_bias[head, part]
                for part in range(3)
            )
            probabilities = (query @ key.T / HEAD_DIM**0.5).softmax(-1)
            probabilities = torch.where(numbers[head] > 0.4, probabilities / 0.6, 0)
            projected = projected + probabilities @ value @ weights.out_weight[head]
        numbers = dropout.hidden_uniform(3, queries, HIDDEN)
        rows.append(torch.where(numbers > 0.3, projected / 0.7, 0) + tokens)
        start += length
    norm = (weights.norm_weight, weights.norm_bias, weights.norm_eps)
    torch.testing.assert_close(actual, F.layer_norm(torch.cat(rows), (HIDDEN,), *norm))


@pytest.mark.parametrize("mask", ["bool", "additive"])
def test_attention_dropout_goes_with_a_mask(mask):
    hidden, weights = random_hidden(8, HIDDEN), heads_on("cpu")
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    options = {"attn_mask": seen if mask == "bool" else added, "attention_dropout_p": 0.4}
    actual = run_attention(hidden, weights, [4, 4], **options)
    for length in (1, 2, 3):
        alone = run_attention(hidden[:length], weights, [length], attention_dropout_p=0.4)
        torch.testing.assert_close(actual[length - 1], alone[-1])


@pytest.mark.parametrize("each", [[2, 4, 1], [4, 2, 2]], ids=["mixed", "sorted"])
def test_masks_do_not_depend_on_grouping_by_width(device, each):
    lengths = [3, 4, 2]
    hidden, weights = random_hidden(9, HIDDEN, device=device), heads_on(device)
    options = {"dropout_p": 0.3, "attention_dropout_p": 0.4}
    widths = torch.tensor(each, dtype=torch.int32)
    together = run_attention(hidden, weights, lengths, heads=widths, **options)
    start = 0
    for length, width in zip(lengths, each, strict=True):
        rows = slice(start, start + length)
        alone = run_attention(hidden, weights, lengths, heads=width, **options)
        torch.testing.assert_close(together[rows], alone[rows])
        start += length
    neurons = neurons_on(device)
    options = {"cu_seqlens": offsets_of(lengths, device)}
    mixed = run_ffn(hidden, neurons, neurons=widths, **options)
    single = run_ffn(hidden, neurons, neurons=each[0], **options)
    torch.testing.assert_close(mixed[:3], single[:3])


def test_max_seqlen_does_not_change_the_mask(device):
    hidden, weights = random_hidden(8, HIDDEN, device=device), heads_on(device)
    tight = run_attention(hidden, weights, [5, 3], attention_dropout_p=0.4)
    loose = run_attention(hidden, weights, [5, 3], attention_dropout_p=0.4, max_seqlen=9)
    torch.testing.assert_close(tight, loose)


def test_one_seed_one_mask(device):
    hidden, weights = random_hidden(11, HIDDEN, device=device), neurons_on(device)
    assert torch.equal(run_ffn(hidden, weights), run_ffn(hidden, weights))
    assert not torch.equal(run_ffn(hidden, weights), run_ffn(hidden, weights, seed=4))
    assert torch.equal(
        run_ffn(hidden, weights, dropout_p=0.0), run_ffn(hidden, weights, dropout_p=0, seed=None)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 1e-5, 0.1, 0.5, 0.999, 1.0])
def test_unseeded_dropout_keeps_the_mean(dtype, dropout_p):
    torch.manual_seed(0)
    values = torch.ones(801, 997, dtype=dtype, requires_grad=True)
    output = dropout.unseeded(values, dropout_p)
    dropped = output.detach()
    share = (dropped == 0).float().mean().item()
    spread = (dropout_p * (1 - dropout_p) / values.numel()) ** 0.5
    assert abs(share - dropout_p) <= 4 * spread + 2**-17
    kept = dropped[dropped != 0].float()
    if 0 < share < 1:
        assert kept.unique().numel() == 1
        assert kept[0].item() * (1 - dropout_p) == pytest.approx(1, rel=0.01)
    output.float().sum().backward()
    assert torch.equal(values.grad != 0, dropped != 0)


def test_unseeded_dropout_follows_torchs_generator():
    values = torch.ones(7, 11)
    torch.manual_seed(3)
    first, second = dropout.unseeded(values, 0.5), dropout.unseeded(values, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout.unseeded(values, 0.5), first)
    assert not torch.equal(first, second)


def test_unseeded_dropout_decides_about_neighbours_alone():
    torch.manual_seed(0)
    kept = (dropout.unseeded(torch.ones(1 << 20), 0.5) != 0).float() - 0.5
    for lag in (1, 2, 3, 4, 8, 64):  # four elements share a word of the generator
        correlation = (kept[:-lag] * kept[lag:]).mean() / 0.25
        assert abs(correlation) < 5 / len(kept) ** 0.5


def test_without_seed_torch_draws(device):
    hidden, weights = random_hidden(11, HIDDEN, device=device), neurons_on(device)
    torch.manual_seed(1)
    first, second = (run_ffn(hidden, weights, seed=None) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(run_ffn(hidden, weights, seed=None), first)
    assert not torch.equal(first, second)
    heads = heads_on(device)
    options = {"seed": None, "attention_dropout_p": 0.4}
    first, second = (run_attention(hidden, heads, [5, 6], **options) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("lengths", [[3, 3], [4, 2]], ids=["equal", "ragged"])
def test_forward_and_backward_use_one_mask(lengths):
    hidden = random_hidden(6, HIDDEN, dtype=torch.float64).requires_grad_()
    heads, neurons = heads_on("cpu", torch.float64), neurons_on("cpu", torch.float64)
    options = {"dropout_p": 0.3, "attention_dropout_p": 0.4}

    def layer(tokens):
        return run_ffn(run_attention(tokens, heads, lengths, **options), neurons)

    assert torch.autograd.gradcheck(layer, (hidden,), fast_mode=True)
