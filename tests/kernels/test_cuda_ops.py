"""Both ops on backend `cuda` without a GPU: the kernels run emulated, as cards of two kinds.

Capability 80 takes the kernels of every card, 90 those of Hopper where they are made for a call. A
tensor of widths on the CPU stands for one on a card.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dynabert_kernels import attention, ffn, proof, use_backend
from dynabert_kernels.ops import _self_check
from dynabert_kernels.ops.attention import ATTENTION, AttentionCall
from dynabert_kernels.ops.attention._cuda import KERNELS as attention_kernels
from dynabert_kernels.ops.encoder import EncoderLayer, EncoderLayers, encoder
from dynabert_kernels.ops.ffn import FFN, FFNCall
from dynabert_kernels.ops.ffn._cuda import KERNELS as ffn_kernels
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
    tensors_of,
)
from dynabert_kernels.varlen import offsets_of
from tests.kernels.emulation import emulated_cuda, emulated_file

HIDDEN = 64
HEAD_DIM = 32
LIMITS = {"attention": 3, "ffn": 70}
NARROW = {"attention": 2, "ffn": 33}
LENGTHS = [5, 0, 9, 4]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

pytestmark = pytest.mark.timeout(1200)  # the first test of all builds the kernels
both_ops = pytest.mark.parametrize("op", LIMITS)
half_types = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def card(request):
    """Backend `cuda` in force on an emulated card; fresh memory holds NaN."""
    with emulated_cuda(request.param):
        torch.use_deterministic_algorithms(True)
        yield request.param
        torch.use_deterministic_algorithms(False)


def weights_of(op, dtype=torch.bfloat16, hidden_size=HIDDEN, head_dim=HEAD_DIM, limit=None):
    limit = limit or LIMITS[op]
    if op == "attention":
        return random_attention(limit, head_dim, hidden_size, dtype=dtype)
    return random_ffn(limit, hidden_size, dtype=dtype)


def tokens_of(lengths=LENGTHS, dtype=torch.bfloat16, hidden_size=HIDDEN):
    return random_hidden(sum(lengths), hidden_size, dtype=dtype, seed=1)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@torch.no_grad()
def call(op, hidden, weights, width, lengths=LENGTHS):
    """The public op."""
    offsets = offsets_of(lengths)
    if op == "ffn":
        return ffn(hidden, weights, intermediate_size=width, cu_seqlens=offsets)
    longest = max(lengths, default=0)
    return attention(hidden, weights, num_heads=width, cu_seqlens=offsets, max_seqlen=longest)


@torch.no_grad()
def on_device(op, hidden, weights, widths, lengths=LENGTHS):
    """What the op makes of widths on a card, whose values it does not see."""
    offsets, compute = offsets_of(lengths), NAMES[hidden.dtype]
    limit = next(iter(tensors_of(weights).values())).shape[0]
    if op == "ffn":
        return FFN(FFNCall(hidden, weights, limit, widths, offsets, 0.0, None, compute))
    rest = (max(lengths), 0.0, 0.0, None, None, compute)
    return ATTENTION(AttentionCall(hidden, weights, limit, widths, offsets, *rest))


def check(op, actual, hidden, weights, width, lengths=LENGTHS):
    """Compares a result with float64, as accurate as plain PyTorch in the same dtype."""
    with use_backend("reference"):
        plain = call(op, hidden, weights, width, lengths)
        truth = call(op, hidden.double(), converted(weights, torch.float64), width, lengths)
    assert_as_accurate(op, actual, plain, truth)


@half_types
@both_ops
def test_a_prefix_is_as_accurate_as_pytorch(card, op, dtype):
    hidden, weights, width = tokens_of(dtype=dtype), weights_of(op, dtype), NARROW[op]
    actual = call(op, hidden, nan_tails(weights, width), width)
    check(op, actual, hidden, weights, width)


@pytest.mark.parametrize("lengths", [[1], [130, 3], [64, 63]], ids=["one", "long", "blocks"])
@both_ops
def test_lengths(card, op, lengths):
    hidden, weights = tokens_of(lengths), weights_of(op)
    check(op, call(op, hidden, weights, 1, lengths), hidden, weights, 1, lengths)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=["none", "empty", "all_empty"])
@both_ops
def test_no_token_is_no_row(card, op, lengths):
    assert call(op, tokens_of(lengths), weights_of(op), 1, lengths).shape == (0, HIDDEN)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@half_types
def test_head_sizes(card, head_dim, dtype):
    hidden, weights = tokens_of(dtype=dtype), weights_of("attention", dtype, head_dim=head_dim)
    actual = call("attention", hidden, nan_tails(weights, 2), 2)
    check("attention", actual, hidden, weights, 2)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
@half_types
def test_activations(card, activation, dtype):
    hidden = tokens_of(dtype=dtype)
    weights = random_ffn(70, HIDDEN, dtype=dtype, activation=activation)
    check("ffn", call("ffn", hidden, weights, 70), hidden, weights, 70)


@pytest.mark.parametrize(
    "hidden_size", [40, 768, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 200, 1040))]
)
@both_ops
def test_sizes_of_a_token(card, op, hidden_size):
    lengths, width = [3, 2], NARROW[op]
    hidden = tokens_of(lengths, hidden_size=hidden_size)
    weights = weights_of(op, hidden_size=hidden_size)
    actual = call(op, hidden, nan_tails(weights, width), width, lengths)
    check(op, actual, hidden, weights, width, lengths)


@both_ops
def test_one_width_on_the_device_is_that_of_the_host(card, op):
    width = NARROW[op]
    hidden, weights = tokens_of(), nan_tails(weights_of(op), width)
    actual = on_device(op, hidden, weights, int32(width))
    torch.testing.assert_close(actual, call(op, hidden, weights, width))


@both_ops
def test_widths_out_of_range_are_clamped(card, op):
    hidden, weights = tokens_of(), weights_of(op)
    full = on_device(op, hidden, weights, int32(LIMITS[op]))
    assert torch.equal(on_device(op, hidden, weights, int32(10**6)), full)
    nothing = on_device(op, hidden, weights, int32(-3))
    assert nothing.shape == full.shape and nothing.isfinite().all()


@half_types
@both_ops
def test_each_sequence_may_have_a_width(card, op, dtype):
    hidden, weights = tokens_of(dtype=dtype), weights_of(op, dtype)
    widths = int32(NARROW[op], LIMITS[op], NARROW[op], 1)
    by_device = on_device(op, hidden, weights, widths)
    check(op, by_device, hidden, weights, widths)
    assert torch.equal(call(op, hidden, weights, widths), by_device)
    narrow = nan_tails(weights, NARROW[op])
    for place, width in ((0, NARROW[op]), (3, 1)):
        rows = slice(*offsets_of(LENGTHS)[place : place + 2].tolist())
        alone = call(op, hidden[rows], nan_tails(weights, width), width, [LENGTHS[place]])
        torch.testing.assert_close(by_device[rows], alone)
    same = on_device(op, hidden, narrow, int32(*[NARROW[op]] * 4))
    torch.testing.assert_close(same, call(op, hidden, narrow, NARROW[op]))


@pytest.mark.parametrize("each", [False, True], ids=["batch", "sequences"])
@both_ops
def test_rows_past_the_last_sequence_touch_nothing(card, op, each):
    widths = int32(LIMITS[op], 1, NARROW[op], 1) if each else int32(NARROW[op])
    hidden, weights = tokens_of(), weights_of(op)
    spare = torch.full((7, HIDDEN), torch.nan, dtype=hidden.dtype)
    actual = on_device(op, torch.cat([hidden, spare]), weights, widths)
    assert actual.shape == (25, HIDDEN)
    torch.testing.assert_close(actual[:18], on_device(op, hidden, weights, widths))


@both_ops
def test_a_neighbour_that_is_not_a_number_stays_alone(card, op):
    hidden, weights = tokens_of(), weights_of(op)
    expected = call(op, hidden, weights, NARROW[op])
    hidden[5:14] = torch.nan
    actual = call(op, hidden, weights, NARROW[op])
    assert actual[5:14].isnan().all()
    assert torch.equal(actual[:5], expected[:5]) and torch.equal(actual[14:], expected[14:])


@both_ops
def test_a_sequence_gives_the_same_bits_in_any_batch(card, op):
    hidden, weights = tokens_of(), weights_of(op)
    together = call(op, hidden, weights, NARROW[op])
    assert torch.equal(call(op, hidden, weights, NARROW[op]), together)
    alone = call(op, hidden[5:14].clone(), weights, NARROW[op], [9])
    torch.testing.assert_close(alone, together[5:14])


@pytest.mark.parametrize("kind", ["apart", "turned", "offset", "repeated"])
@both_ops
def test_rows_anywhere_in_memory(card, op, kind):
    hidden, weights = tokens_of(), weights_of(op)
    if kind == "apart":
        strided = torch.full((18, HIDDEN + 8), torch.nan, dtype=hidden.dtype)[:, :HIDDEN]
    elif kind == "turned":
        strided = torch.empty(HIDDEN, 18, dtype=hidden.dtype).T
    elif kind == "offset":
        strided = torch.empty(18 * HIDDEN + 1, dtype=hidden.dtype)[1:].view(18, HIDDEN)
    else:
        strided = hidden[:1].expand(18, HIDDEN)
        hidden = strided.contiguous()
    if kind != "repeated":
        strided.copy_(hidden)
    assert kind == "offset" or not strided.is_contiguous()
    actual = call(op, strided, weights, NARROW[op])
    assert torch.equal(actual, call(op, hidden, weights, NARROW[op]))


@half_types
@both_ops
def test_float32_weights_under_autocast(card, op, dtype):
    hidden, weights = tokens_of(dtype=torch.float32), weights_of(op, torch.float32)
    narrow = nan_tails(weights, NARROW[op])
    with torch.autocast("cpu", dtype):
        actual = call(op, hidden, narrow, NARROW[op])
        with use_backend("reference"):
            plain = call(op, hidden, weights, NARROW[op])
    with use_backend("reference"):
        truth = call(op, hidden.double(), converted(weights, torch.float64), NARROW[op])
    assert actual.dtype == torch.float32
    assert_as_accurate(op, actual, plain, truth)


@both_ops
def test_half_precision_tokens_take_float32_weights(card, op):
    hidden, weights = tokens_of(), weights_of(op, torch.float32)
    widths = int32(LIMITS[op], 1, NARROW[op], NARROW[op])
    check(op, call(op, hidden, weights, widths), hidden, weights, widths)


@pytest.mark.parametrize("card", [80], ids="sm_{}".format, indirect=True)
@both_ops
def test_compiles_to_one_graph_for_all_widths(card, op):
    hidden, weights = tokens_of(), weights_of(op)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for width in (NARROW[op], LIMITS[op]):
        assert torch.equal(compiled(op, hidden, weights, width), call(op, hidden, weights, width))
    torch.compiler.reset()


@both_ops
def test_passes_opcheck(card, op):
    hidden, weights, offsets = tokens_of([3, 2]), weights_of(op), int32(0, 3, 5)
    tensors = (*tensors_of(weights).values(), weights.norm_eps)
    if op == "ffn":
        rest = ("gelu", LIMITS[op], int32(33, 1), offsets, 0.0, None, "bfloat16")
    else:
        rest = (LIMITS[op], int32(2, 1), offsets, 3, 0.0, 0.0, None, "bfloat16")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    overload = getattr(torch.ops.dynabert, op).cuda
    torch.library.opcheck(overload, (hidden, *tensors, *rest), test_utils=checks)


SMALL = {
    "attention": (
        _self_check.Problem((5, 0, 9), 40, 3, 2),
        _self_check.Problem((5, 3), 64, 3, (1, 3)),
    ),
    "ffn": (_self_check.Problem((5, 0, 9), 64, 70, 33), _self_check.Problem((5, 3), 40, 70, (33,))),
}
KERNELS = {"attention": attention_kernels, "ffn": ffn_kernels}


def path_of(op, dtype="bfloat16", head_dim=HEAD_DIM):
    size = None if op == "ffn" else head_dim
    return proof.Path("cuda", op, dtype, size, "forward", "sm_90")


@both_ops
def test_the_self_check_agrees_and_finds_a_wrong_kernel(card, op):
    cpu, right = torch.device("cpu"), KERNELS[op]
    assert _self_check.difference(right, path_of(op), cpu, SMALL[op]) is None
    wrong = replace(right, forward=lambda *arguments: right.forward(*arguments) * 1.01)
    assert "output: " in _self_check.difference(wrong, path_of(op), cpu, SMALL[op])


@pytest.mark.slow
@half_types
@both_ops
def test_the_kernels_agree_at_the_sizes_of_a_first_use(card, op, dtype):
    path = path_of(op, NAMES[dtype], head_dim=64)
    assert KERNELS[op].check(path, torch.device("cpu")) is None


@pytest.fixture
def hopper():
    """Backend `cuda` in force on a card with room for the persistent encoder."""
    with emulated_cuda(90, multiprocessors=64):
        yield


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_the_self_check_of_the_encoder_agrees(hopper, head_dim, on_device):
    widths = ((3, 48),) * 2 if on_device else ((4, 64), (1, 16))
    problem = _self_check.EncoderProblem((5, 9), 128, (4, 64), widths, on_device)
    path = proof.Path("cuda", "encoder", "bfloat16", head_dim, "forward", "sm_90")
    assert _self_check.encoder_difference(path, torch.device("cpu"), (problem,)) is None


def test_layers_that_the_encoder_is_not_made_for_are_the_ops_to_the_bit(card):
    lengths, dtype = [5, 9], torch.float16
    made = [weights_of("attention", dtype), weights_of("ffn", dtype)]
    layers = [EncoderLayer(*made, 2, 33), EncoderLayer(*made, 3, 70)]
    hidden, offsets = tokens_of(lengths, dtype), offsets_of(lengths)
    expected = hidden
    for layer in layers:
        expected = call("attention", expected, layer.attention, layer.num_heads, lengths)
        expected = call("ffn", expected, layer.ffn, layer.intermediate_size, lengths)
    packed = EncoderLayers.of(layers)
    assert encoder(hidden, packed, cu_seqlens=offsets, max_seqlen=9) is None  # gradients
    with torch.no_grad():
        result = encoder(hidden, packed, cu_seqlens=offsets, max_seqlen=9)
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_the_environment_names_the_module():
    code = """
import torch, dynabert_kernels as kernels
from dynabert_kernels.doctor import doctor_report
from dynabert_kernels.testing import random_ffn, random_hidden
options = {"dtype": torch.float16}
arguments = random_hidden(3, 16, **options), random_ffn(9, 16, **options)
results = []
with torch.no_grad():
    for backend in (None, "cuda", "reference"):
        with kernels.use_backend(backend):
            results.append(kernels.ffn(*arguments, intermediate_size=5))
torch.testing.assert_close(results[1], results[2], rtol=0.01, atol=0.01)
print(torch.equal(results[0], results[2]), doctor_report()["ops"]["ffn"]["cuda"])
"""
    environment = os.environ | {"DYNABERT_CUDA_EMULATION": str(emulated_file())}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "True the emulation of CUDA kernels is for tests; choose it with use_backend('cuda')\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[128], [300, 7]], ids=["one", "ragged"])
@both_ops
def test_a_sublayer_of_bert_base(card, op, lengths):
    width, limit = (6, 12) if op == "attention" else (768, 1024)
    hidden = tokens_of(lengths, hidden_size=768)
    weights = weights_of(op, hidden_size=768, head_dim=64, limit=limit)
    actual = call(op, hidden, nan_tails(weights, width), width, lengths)
    check(op, actual, hidden, weights, width, lengths)
