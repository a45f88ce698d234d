"""Both ops on backend `triton`: what only it has, and its agreement with the reference.

Properties that every backend shares are in test_attention.py and test_ffn.py. Without a GPU the
kernels run in Triton's interpreter, where a tensor of widths on the CPU stands for one on a card.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env, attention, ffn, use_backend
from dynabert_kernels.ops.attention import ATTENTION, AttentionCall
from dynabert_kernels.ops.ffn import FFN, FFNCall
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

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bfloat16 is wrong
HIDDEN = 40
LIMITS = {"attention": 3, "ffn": 70}
NARROW = {"attention": 2, "ffn": 33}
LENGTHS = [5, 0, 9, 4]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _env.triton_interpret(), reason="TRITON_INTERPRET is not set"
)
both_ops = pytest.mark.parametrize("op", LIMITS)


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """Fresh memory holds NaN, and NumPy computes with NaN in silence."""
    torch.use_deterministic_algorithms(True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


def weights_of(op, dtype=torch.float32):
    if op == "attention":
        return random_attention(LIMITS[op], 32, HIDDEN, dtype=dtype, device=DEVICE)
    return random_ffn(LIMITS[op], HIDDEN, dtype=dtype, device=DEVICE)


def tokens_of(lengths=LENGTHS, dtype=torch.float32, seed=1):
    return random_hidden(sum(lengths), HIDDEN, dtype=dtype, device=DEVICE, seed=seed)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def call(op, hidden, weights, width, lengths=LENGTHS, *, dropout_p=0.0, seed=None):
    """The public op."""
    offsets = offsets_of(lengths, DEVICE)
    if op == "ffn":
        options = {"cu_seqlens": offsets, "dropout_p": dropout_p, "seed": seed}
        return ffn(hidden, weights, intermediate_size=width, **options)
    return attention(
        hidden,
        weights,
        num_heads=width,
        cu_seqlens=offsets,
        max_seqlen=max(lengths),
        dropout_p=dropout_p,
        attention_dropout_p=dropout_p,
        seed=seed,
    )


def on_device(op, hidden, weights, widths, lengths=LENGTHS, *, dropout_p=0.0, seed=None):
    """What the op makes of widths on a card, whose values it does not see."""
    offsets, common = offsets_of(lengths, DEVICE), (dropout_p, seed, "float32")
    if op == "ffn":
        return FFN(FFNCall(hidden, weights, LIMITS[op], widths, offsets, *common))
    limit, longest = LIMITS[op], max(lengths)
    dropouts = (dropout_p, dropout_p, seed, None, "float32")
    return ATTENTION(AttentionCall(hidden, weights, limit, widths, offsets, longest, *dropouts))


def gradients(function: Any, op, hidden, weights, *arguments, upstream=None, **more):
    """Output and all gradients by name, on backend `triton`."""
    tokens = hidden.detach().clone().requires_grad_()
    leaves = converted(weights, requires_grad=True)
    output = function(op, tokens, leaves, *arguments, **more)
    if upstream is None:
        upstream = random_hidden(*hidden.shape, device=DEVICE, seed=2)
    output.backward(upstream.to(output.dtype))
    named = {name: tensor.grad for name, tensor in tensors_of(leaves).items()}
    return {"output": output.detach(), "hidden": tokens.grad, **named}


def assert_close(actual, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
@both_ops
def test_gradients_equal_those_of_the_reference(op, dropout_p):
    hidden, weights = tokens_of(), weights_of(op)
    arguments = (op, hidden, weights, NARROW[op])
    options = {"dropout_p": dropout_p, "seed": 2**40 + 3}
    with use_backend("triton"):
        actual = gradients(call, *arguments, **options)
    with use_backend("reference"):
        expected = gradients(call, *arguments, **options)
    assert_close(actual, expected)


@pytest.mark.parametrize("each", [False, True], ids=["batch", "sequences"])
@both_ops
def test_widths_that_the_device_knows_equal_those_of_the_host(op, each):
    width = NARROW[op]
    hidden, weights = tokens_of(), nan_tails(weights_of(op), width)
    widths = int32(*[width] * len(LENGTHS)) if each else int32(width)
    with use_backend("triton"):
        actual = gradients(on_device, op, hidden, weights, widths)
        expected = gradients(call, op, hidden, weights, width)
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("each", "dropout_p"), [(False, 0.0), (True, 0.3)], ids=["batch", "sequences-dropout"]
)
@both_ops
def test_rows_past_the_last_sequence_touch_nothing(op, each, dropout_p):
    widths = int32(LIMITS[op], 1, NARROW[op], 1) if each else int32(NARROW[op])
    hidden, weights = tokens_of(), weights_of(op)
    if not each:
        weights = nan_tails(weights, NARROW[op])
    spare = torch.full((7, HIDDEN), torch.nan, device=DEVICE)
    upstream = tokens_of(seed=2)
    options = {"dropout_p": dropout_p, "seed": 5}
    with use_backend("triton"):
        expected = gradients(on_device, op, hidden, weights, widths, upstream=upstream, **options)
        longer = torch.cat([hidden, spare])
        upstream = torch.cat([upstream, spare])
        actual = gradients(on_device, op, longer, weights, widths, upstream=upstream, **options)
    assert actual["output"].shape == actual["hidden"].shape == longer.shape
    for name in ("output", "hidden"):
        actual[name] = actual[name][: len(hidden)]
    assert_close(actual, expected)


@both_ops
def test_the_reference_leaves_rows_past_the_last_sequence_alone(op):
    hidden, weights = tokens_of(), weights_of(op)
    widths = int32(LIMITS[op], 1, NARROW[op], 1)
    spare = torch.full((7, HIDDEN), torch.nan, device=DEVICE)
    upstream, longer = tokens_of(seed=2), torch.cat([hidden, spare])
    with use_backend("reference"):
        expected = gradients(on_device, op, hidden, weights, widths, upstream=upstream)
        upstream = torch.cat([upstream, spare])
        actual = gradients(on_device, op, longer, weights, widths, upstream=upstream)
        nothing = on_device(op, longer, weights, widths, [0] * 4)
    assert nothing.shape == longer.shape
    for name in ("output", "hidden"):
        actual[name] = actual[name][: len(hidden)]
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
@both_ops
def test_one_width_in_a_tensor_is_that_width(op, name):
    device = "cpu" if name == "cpu" else DEVICE
    hidden, weights = tokens_of().to(device), converted(weights_of(op), device=device)
    operator = ATTENTION if op == "attention" else FFN
    reason = dict(operator.status(device))[name]
    if reason is not None:
        pytest.skip(reason)
    offsets = offsets_of(LENGTHS, device)

    def run(width):
        if op == "ffn":
            return ffn(hidden, weights, intermediate_size=width, cu_seqlens=offsets)
        return attention(hidden, weights, num_heads=width, cu_seqlens=offsets, max_seqlen=9)

    host = torch.tensor([NARROW[op]], dtype=torch.int32)
    with use_backend(name), torch.no_grad():
        expected = run(NARROW[op])
        assert torch.equal(run(host), expected)
        torch.testing.assert_close(run(host.to(device)), expected)


@both_ops
def test_float32_weights_train_under_autocast(op):
    hidden, weights = tokens_of(), weights_of(op)
    arguments = (op, hidden, weights, NARROW[op])
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend), torch.autocast(DEVICE, HALF):
            results.append(gradients(call, *arguments))
    with use_backend("reference"):
        double = gradients(call, op, hidden.double(), converted(weights, torch.float64), NARROW[op])
    for name, truth in double.items():
        assert results[0][name].dtype == torch.float32, name
        assert_as_accurate(name, results[0][name], results[1][name], truth, factor=3)


@both_ops
def test_half_precision_tokens_train_float32_weights(op):
    hidden, weights = tokens_of(dtype=HALF), weights_of(op)
    widths = torch.tensor([LIMITS[op], 1, NARROW[op], NARROW[op]], dtype=torch.int32)
    arguments = (op, hidden, weights, widths)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(gradients(call, *arguments))
    with use_backend("reference"):
        double = gradients(call, op, hidden.double(), converted(weights, torch.float64), widths)
    for name, truth in double.items():
        half = name in ("hidden", "output")
        assert results[0][name].dtype == (HALF if half else torch.float32)
        # The sum that is normalised is kept in the tokens' dtype, where the reference has float32.
        factor = 4 if half else 3
        assert_as_accurate(name, results[0][name], results[1][name], truth, factor=factor)


@both_ops
def test_an_unseeded_call_draws_one_seed_for_both_directions(op):
    hidden, weights = tokens_of(), weights_of(op)
    arguments = (op, hidden, weights, NARROW[op])
    with use_backend("triton"):
        torch.manual_seed(3)
        actual = gradients(call, *arguments, dropout_p=0.4)
        with torch.no_grad():
            another = call(*arguments, dropout_p=0.4)
        torch.manual_seed(3)
        drawn = int(torch.randint(2**63 - 1, (1,), device=DEVICE))
        expected = gradients(call, *arguments, dropout_p=0.4, seed=drawn)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    assert not torch.equal(another, actual["output"])


@pytest.mark.parametrize("with_widths", [False, True], ids=["int", "widths"])
@both_ops
def test_passes_opcheck(op, with_widths):
    hidden, weights = tokens_of([3, 2]), weights_of(op)
    packet = getattr(torch.ops.dynabert, op)
    widths, offsets = int32(NARROW[op], 1) if with_widths else None, int32(0, 3, 5)
    width = LIMITS[op] if with_widths else NARROW[op]
    tensors = (*tensors_of(converted(weights, requires_grad=True)).values(), weights.norm_eps)
    if op == "ffn":
        rest = ("gelu", width, widths, offsets, 0.25, 7, "float32")
    else:
        rest = (width, widths, offsets, 3, 0.25, 0.25, 7, "float32")
    arguments = (hidden.requires_grad_(), *tensors, *rest)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(packet.triton_training, arguments, test_utils=checks)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(packet.triton, detached, test_utils=checks)


def encoder_layer(hidden, heads_of, neurons_of, heads, neurons):
    middle = call("attention", hidden, heads_of, heads)
    return call("ffn", middle, neurons_of, neurons).square().sum()


@pytest.mark.parametrize(
    "compiler",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.gpu, pytest.mark.slow])],
)
def test_compiles_to_one_graph_for_all_widths(compiler):
    torch.compiler.reset()
    compiled = torch.compile(encoder_layer, fullgraph=True, backend=compiler)
    leaves = [converted(weights_of(op), requires_grad=True) for op in LIMITS]
    copies = [converted(weights, requires_grad=True) for weights in leaves]
    hidden = tokens_of()
    counts = [(3, 1, 2, 1), (1, 2, 2, 3)] if DEVICE == "cuda" else [(3, 1, 2, 1)]
    stance = "default"
    with use_backend("triton"):
        for count in counts:
            widths = int32(*count), int32(*(20 * width for width in count))
            with torch.compiler.set_stance(stance):
                compiled(hidden, *leaves, *widths).backward()
            encoder_layer(hidden, *copies, *widths).backward()
            stance = "fail_on_recompile"
    for weights, copy in zip(leaves, copies, strict=True):
        for name, tensor in tensors_of(weights).items():
            expected = getattr(copy, name).grad
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-4, atol=1e-4, msg=name)
    torch.compiler.reset()


def on_static_tensors(op, hidden, weights, widths, offsets, dropout_p=0.0):
    """The public op on tensors that a captured graph reads anew at every replay."""
    if op == "ffn":
        return ffn(
            hidden, weights, intermediate_size=widths, cu_seqlens=offsets, dropout_p=dropout_p
        )
    return attention(
        hidden,
        weights,
        num_heads=widths,
        cu_seqlens=offsets,
        max_seqlen=16,
        dropout_p=dropout_p,
        attention_dropout_p=dropout_p,
    )


def captured(function):
    """`function` as a replayed graph, without a wait for the device in it; and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("each", [False, True], ids=["batch", "sequences"])
@both_ops
def test_one_graph_serves_all_widths_and_lengths(op, each):
    weights = converted(weights_of(op), requires_grad=True)
    leaves = list(tensors_of(weights).values())
    # The captured leaves' gradients belong to the stream of the capture.
    twin = converted(weights, requires_grad=True)
    twins = list(tensors_of(twin).values())
    hidden = tokens_of([16, 16, 16]).requires_grad_()
    upstream = tokens_of([16, 16, 16], seed=2)
    offsets = offsets_of([16, 16, 16], DEVICE)
    widths = int32(1, 1, 1) if each else int32(1)

    def step():
        output = on_static_tensors(op, hidden, weights, widths, offsets)
        return output, *torch.autograd.grad(output, [hidden, *leaves], upstream)

    with use_backend("triton"):
        graph, result = captured(step)
        limit = LIMITS[op]
        for lengths, values in (
            ([16, 16, 16], [limit] * 3),
            ([3, 0, 9], [NARROW[op], limit, 1] if each else [NARROW[op]] * 3),
            ([16, 1, 2], [1, 1, NARROW[op]] if each else [1] * 3),
        ):
            offsets.copy_(offsets_of(lengths, DEVICE))
            widths.copy_(int32(*values) if each else int32(values[0]))
            graph.replay()
            real = sum(lengths)
            host = torch.tensor(values, dtype=torch.int32)
            tokens = hidden.detach()[:real].requires_grad_()
            expected = call(op, tokens, twin, host, lengths)
            grads = torch.autograd.grad(expected, [tokens, *twins], upstream[:real])
            torch.testing.assert_close(result[0][:real], expected)
            torch.testing.assert_close(result[1][:real], grads[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(list(result[2:]), list(grads[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@both_ops
def test_a_captured_graph_draws_masks_anew(op):
    hidden, weights, offsets = tokens_of(), weights_of(op), offsets_of(LENGTHS, DEVICE)

    def step():
        with torch.no_grad():
            return on_static_tensors(op, hidden, weights, NARROW[op], offsets, dropout_p=0.5)

    with use_backend("triton"):
        graph, result = captured(step)
        graph.replay()
        first = result.clone()
        graph.replay()
        assert not torch.equal(result, first)
