"""Training on the C++ kernels: gradients against float64, dropout against the reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynabert_kernels import PackedAttention, PackedFFN, _extension, attention, ffn, use_backend
from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.ops import _cpu
from dynabert_kernels.ops.attention import ATTENTION
from dynabert_kernels.ops.attention import _cpu as attention_cpu
from dynabert_kernels.ops.ffn import FFN
from dynabert_kernels.ops.ffn import _cpu as ffn_cpu
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

if _cpu.kernels_missing() is not None:
    pytest.skip(str(_cpu.kernels_missing()), allow_module_level=True)

Weights = PackedAttention | PackedFFN
Gradients = dict[str, Tensor]
OPS = ["attention", "ffn"]
DTYPES = [torch.float32, torch.bfloat16]
ISAS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
# Sizes that are no whole panel, pair, group, tile or block of keys.
HIDDEN, HEADS, NEURONS = 72, 3, 601
LENGTHS = [1, 0, 63, 7, 30]
OFFSETS = offsets_of(LENGTHS)
TOKENS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def cpu_backend() -> Iterator[None]:
    with use_backend("cpu"):
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(op: str, dtype: torch.dtype = torch.float32, **more: Any) -> Weights:
    if op == "ffn":
        return random_ffn(NEURONS, HIDDEN, dtype=dtype, **more)
    return random_attention(HEADS, 24, HIDDEN, dtype=dtype, **more)


def run(op: str, hidden: Tensor, weights: Weights, width: int | Tensor, **more: Any) -> Tensor:
    offsets = more.pop("offsets", OFFSETS)
    if isinstance(weights, PackedFFN):
        return ffn(hidden, weights, intermediate_size=width, cu_seqlens=offsets, **more)
    return attention(
        hidden, weights, num_heads=width, cu_seqlens=offsets, max_seqlen=len(hidden), **more
    )


def plain(
    op: str, hidden: Tensor, weights: Weights, width: int | Tensor, *, offsets: Tensor = OFFSETS
) -> Tensor:
    """What anyone would write in PyTorch, one sequence after the other."""
    parts = []
    lengths = (offsets[1:] - offsets[:-1]).tolist()
    widths = width.tolist() if isinstance(width, Tensor) else [width] * len(lengths)
    for part, own in zip(hidden.split(lengths), widths, strict=True):
        if isinstance(weights, PackedFFN):
            activate = {
                "gelu": F.gelu,
                "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
                "relu": F.relu,
            }[weights.activation]
            up = F.linear(part, weights.up_weight[:own], weights.up_bias[:own])
            out = activate(up) @ weights.down_weight[:own] + weights.down_bias
        else:
            size = (len(part), own, 3, weights.head_dim)
            matrix = weights.qkv_weight[:own].flatten(0, 2)
            qkv = F.linear(part, matrix, weights.qkv_bias[:own].flatten()).view(size)
            scores = torch.einsum("qhd,khd->hqk", qkv[:, :, 0], qkv[:, :, 1])
            chances = (scores / weights.head_dim**0.5).softmax(-1)
            context = torch.einsum("hqk,khd->qhd", chances, qkv[:, :, 2]).flatten(1)
            out = context @ weights.out_weight[:own].flatten(0, 1) + weights.out_bias
        norm = (weights.norm_weight, weights.norm_bias, weights.norm_eps)
        parts.append(F.layer_norm(out + part, out.shape[-1:], *norm))
    return torch.cat(parts)


def gradients(
    function: Callable[..., Tensor],
    op: str,
    hidden: Tensor,
    weights: Weights,
    width: int | Tensor,
    **more: Any,
) -> Gradients:
    """The output and the gradient of every tensor, for one upstream gradient."""
    tokens = hidden.detach().clone().requires_grad_()
    leaves = converted(weights, requires_grad=True)
    output = function(op, tokens, leaves, width, **more)
    output.backward(random_hidden(*output.shape, dtype=output.dtype, seed=2))
    found = {name: tensor.grad for name, tensor in tensors_of(leaves).items()}
    return {"output": output.detach(), "hidden": tokens.grad, **found}  # type: ignore[dict-item]


def check(
    op: str,
    hidden: Tensor,
    weights: Weights,
    width: int | Tensor,
    factor: float = 2.0,
    **more: Any,
) -> Gradients:
    """Output and gradients are at most `factor` times as wrong as PyTorch's."""
    actual = gradients(run, op, hidden, weights, width, **more)
    simple = gradients(plain, op, hidden, weights, width, **more)
    double = converted(weights, torch.float64)
    truth = gradients(plain, op, hidden.double(), double, width, **more)
    for name, expected in truth.items():
        assert_as_accurate(name, actual[name], simple[name], expected, factor=factor)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("neurons", [9, 37, 523, NEURONS], ids="i{}".format)
def test_ffn_gradients_are_as_accurate_as_pytorch(
    dtype: torch.dtype, activation: str, neurons: int
) -> None:
    hidden = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1)
    weights = make("ffn", dtype, activation=activation)
    found = check("ffn", hidden, weights, neurons)
    assert all(not found[name][neurons:].any() for name in ("up_weight", "up_bias", "down_weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_attention_gradients_are_as_accurate_as_pytorch(
    dtype: torch.dtype, head_dim: int, heads: int
) -> None:
    hidden = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1)
    found = check(
        "attention", hidden, random_attention(HEADS, head_dim, HIDDEN, dtype=dtype), heads
    )
    assert all(not found[name][heads:].any() for name in ("qkv_weight", "qkv_bias", "out_weight"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_many_tokens(op: str, dtype: torch.dtype) -> None:
    """More tokens than a chunk of the reductions, more keys than a block."""
    offsets = offsets_of([1025, 30])
    hidden = random_hidden(1055, HIDDEN, dtype=dtype, seed=1)
    check(op, hidden, make(op, dtype), 523 if op == "ffn" else 2, offsets=offsets)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(op: str, dtype: torch.dtype, isa: str) -> None:
    module = _extension.cpu_extension()
    if isa not in module.supported_isas():
        pytest.skip(f"this CPU has no {isa}")
    before = module.isa_name()
    hidden = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1)
    module.force_isa(isa)
    try:
        check(op, hidden, make(op, dtype), 3)
    finally:
        module.force_isa(before)


@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_float32_weights_under_autocast(op: str, hidden_dtype: torch.dtype) -> None:
    hidden = random_hidden(TOKENS, HIDDEN, dtype=hidden_dtype, seed=1)
    weights = make(op)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(run, op, hidden, weights, 2)
    simple = gradients(plain, op, hidden.bfloat16(), converted(weights, torch.bfloat16), 2)
    truth = gradients(plain, op, hidden.double(), converted(weights, torch.float64), 2)
    for name, gradient in actual.items():
        is_token = name in ("output", "hidden")
        assert gradient.dtype == (hidden_dtype if is_token else torch.float32)
        assert_as_accurate(name, gradient.bfloat16(), simple[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("op", OPS)
def test_each_sequence_has_its_width(op: str, order: str, dtype: torch.dtype) -> None:
    widths = [3, 3, 2, 2, 1] if op == "attention" else [590, 301, 301, 37, 9]
    if order == "mixed":
        widths = widths[::-2] + widths[1::2]
    hidden = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1)
    found = check(op, hidden, make(op, dtype), int32(*widths))
    name = "up_weight" if op == "ffn" else "qkv_weight"
    assert not found[name][max(widths) :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_nan_beyond_the_widest_prefix_reaches_no_gradient(op: str, dtype: torch.dtype) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1), make(op, dtype)
    width = 37 if op == "ffn" else 2
    clean = gradients(run, op, hidden, weights, width)
    dirty = gradients(run, op, hidden, nan_tails(weights, width), width)
    for name, gradient in clean.items():
        assert torch.equal(gradient, dirty[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_sequence_meets_no_weight_beyond_its_width(op: str, dtype: torch.dtype) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1), make(op, dtype)
    narrow, wide = (37, 38) if op == "ffn" else (1, 2)
    widths = int32(narrow, narrow, narrow, wide, narrow)
    clean = gradients(run, op, hidden, weights, widths)
    dirty = gradients(run, op, hidden, nan_tails(weights, narrow), widths)
    others = [*range(64), *range(71, TOKENS)]
    for name in ("output", "hidden"):
        assert dirty[name][64:71].isnan().all()
        assert torch.equal(dirty[name][others], clean[name][others])


@pytest.mark.parametrize("dropout", [{"dropout_p": 0.3}, {"attention_dropout_p": 0.4}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_seed_gives_the_masks_of_the_reference(
    op: str, dtype: torch.dtype, dropout: dict[str, float]
) -> None:
    if op == "ffn" and "dropout_p" not in dropout:
        pytest.skip("ffn has no attention weights")
    hidden, weights = random_hidden(TOKENS, HIDDEN, dtype=dtype, seed=1), make(op, dtype)
    options: dict[str, Any] = {"seed": 2**40 + 7, **dropout}
    actual = gradients(run, op, hidden, weights, 3, **options)
    with use_backend("reference"):
        simple = gradients(run, op, hidden, weights, 3, **options)
        double = converted(weights, torch.float64)
        truth = gradients(run, op, hidden.double(), double, 3, **options)
        other = gradients(run, op, hidden, weights, 3, **{**options, "seed": 8})
    for name, expected in truth.items():
        assert_as_accurate(name, actual[name], simple[name], expected)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate("another seed", other["output"], simple["output"], truth["output"])


@pytest.mark.parametrize("kind", ["dropout_p", "attention_dropout_p"])
def test_dropout_without_a_seed_follows_torchs_generator(kind: str) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, seed=1), make("attention")

    def once(seed: int) -> Gradients:
        torch.manual_seed(seed)
        return gradients(run, "attention", hidden, weights, 3, **{kind: 0.3})

    first, again, other = once(1), once(1), once(2)
    assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())
    assert not torch.equal(first["output"], other["output"])
    torch.manual_seed(1)
    twice = [run("ffn", hidden.requires_grad_(), make("ffn"), 9, dropout_p=0.5) for _ in range(2)]
    assert not torch.equal(*twice)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_without_a_seed_keeps_the_right_share(p: float) -> None:
    """With zero weights the bias is left: what goes into the norm shows the mask."""
    weights = converted(random_ffn(16, 512), torch.float32)
    weights.down_weight.zero_()
    weights.down_bias.fill_(1.0)
    tokens = 400
    hidden = torch.zeros(tokens, 512, requires_grad=True)
    bias = weights.down_bias.requires_grad_()
    arguments = (hidden, *tensors_of(weights).values(), 1e-12, "gelu", 16, None, None, p, None)
    output, _, total, seed = torch.ops.dynabert.ffn.cpu_training(*arguments, "float32")
    kept = total != 0
    # Four standard deviations.
    assert kept.float().mean().item() == pytest.approx(
        1 - p, abs=4 * (p * (1 - p) / kept.numel()) ** 0.5
    )
    torch.testing.assert_close(
        total[kept], torch.full_like(total[kept], 1 / (1 - p)), rtol=1e-3, atol=0
    )
    # No row or column is drawn like another.
    assert len(kept.unique(dim=0)) == tokens
    assert len(kept.unique(dim=1)[0]) == 512
    upstream = random_hidden(tokens, 512, seed=3)
    output.backward(upstream)
    assert bias.grad is not None and hidden.grad is not None
    # The residual brings the gradient of `total` itself to `hidden`; up_weight adds nothing.
    torch.testing.assert_close(bias.grad, (hidden.grad * total).sum(0), rtol=1e-4, atol=1e-4)
    assert seed.shape == (1,)


def test_attention_weights_are_dropped_in_the_right_share() -> None:
    """Equal scores and values of one make the context the share of kept weights."""
    p, length = 0.3, 300
    weights = random_attention(2, 8, 16)
    weights.qkv_weight.zero_()
    weights.qkv_bias.zero_()
    weights.qkv_bias[:, 2] = 1.0
    leaves = converted(weights, requires_grad=True)
    hidden = random_hidden(2 * length, 16, seed=1)
    offsets = offsets_of([length, length])
    options = (1e-12, 2, None, offsets, length, 0.0, p, None, "float32")
    tensors = tensors_of(leaves).values()
    context = torch.ops.dynabert.attention.cpu_training(hidden, *tensors, *options)[2][:, :, 0]
    share = context * (1 - p) * length  # weights kept in each row
    assert share.mean().item() / length == pytest.approx(
        1 - p, abs=4 * (p * (1 - p) / (share.numel() * length)) ** 0.5
    )
    deviation = (p * (1 - p) * length) ** 0.5
    assert share.std().item() == pytest.approx(deviation, rel=0.15)
    assert not torch.equal(context[:, 0], context[:, 1])
    assert not torch.equal(context[:length], context[length:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_do_not_depend_on_threads(
    op: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    offsets = offsets_of([700, 30, 3])
    hidden = random_hidden(733, HIDDEN, dtype=dtype, seed=1)
    weights, found = make(op, dtype), []
    options = {"offsets": offsets, "dropout_p": 0.1, "seed": 3}
    for number in (1, 2, 3, 2, 2):
        threads(number)
        found.append(gradients(run, op, hidden, weights, int32(3, 2, 1), **options))
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_and_no_sequences(op: str) -> None:
    for lengths in ([], [0, 0]):
        hidden = torch.empty(0, HIDDEN)
        found = gradients(run, op, hidden, make(op), 2, offsets=offsets_of(lengths))
        assert found["output"].shape == found["hidden"].shape == (0, HIDDEN)
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("op", OPS)
def test_strided_and_offset_inputs(op: str) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, seed=1), make(op)
    expected = gradients(run, op, hidden, weights, 2)
    storage = torch.full((TOKENS, HIDDEN + 7), torch.nan)
    storage[:, 3 : 3 + HIDDEN] = hidden
    leaf = storage.requires_grad_()
    leaves = converted(weights, requires_grad=True)
    output = run(op, leaf[:, 3 : 3 + HIDDEN], leaves, 2)
    upstream = random_hidden(TOKENS, HIDDEN, seed=2)
    (output.t() * upstream.t()).sum().backward()
    assert torch.equal(output, expected["output"])
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, 3 : 3 + HIDDEN], expected["hidden"])
    for name, tensor in tensors_of(leaves).items():
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected[name])


@pytest.mark.parametrize("op", OPS)
def test_gradients_only_where_they_are_needed(op: str) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, seed=1), make(op)
    output = run(op, hidden.requires_grad_(), weights, 2)
    output.sum().backward()
    assert hidden.grad is not None
    assert all(tensor.grad is None for tensor in tensors_of(weights).values())


@pytest.mark.parametrize("op", OPS)
def test_a_graph_may_be_walked_twice_but_not_differentiated_twice(op: str) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, seed=1), make(op)
    tokens = hidden.requires_grad_()
    output = run(op, tokens, weights, 2, dropout_p=0.2)
    upstream = random_hidden(TOKENS, HIDDEN, seed=2)
    first, second = (
        torch.autograd.grad(output, tokens, upstream, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(output, tokens, upstream, create_graph=True)
    message = rf"{op}: backend='cpu' in a second derivative, expected 'reference'\."
    with pytest.raises(NotImplementedError, match=message):
        gradient.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_passes_opcheck(op: str) -> None:
    tensors = tensors_of(converted(make(op), requires_grad=True)).values()
    hidden = random_hidden(TOKENS, HIDDEN, seed=1).requires_grad_()
    options: tuple[Any, ...] = (1e-12, "gelu", 37, None, OFFSETS, 0.1, 5, "float32")
    if op == "attention":
        options = (1e-12, 2, None, OFFSETS, 63, 0.1, 0.1, 5, "float32")
    overload = getattr(torch.ops.dynabert, op).cpu_training
    torch.library.opcheck(overload, (hidden, *tensors, *options))


@pytest.mark.parametrize("op", OPS)
def test_compiles_in_one_graph(op: str) -> None:
    hidden, weights = random_hidden(TOKENS, HIDDEN, seed=1), make(op)

    def step(op: str, hidden: Tensor, weights: Weights, width: int) -> Tensor:
        return torch.compile(run, fullgraph=True, backend="aot_eager")(op, hidden, weights, width)

    width = 37 if op == "ffn" else 2
    eager = gradients(run, op, hidden, weights, width)
    compiled = gradients(step, op, hidden, weights, width)
    for name, gradient in eager.items():
        assert torch.equal(gradient, compiled[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_automatic_choice_trains_here_from_enough_tokens(op: str, compute: str) -> None:
    table = FFN if op == "ffn" else ATTENTION
    fewest = ffn_cpu.FEWEST_TRAINED[compute] if op == "ffn" else attention_cpu.FEWEST_TRAINED
    calls = []

    def reference(call: Any) -> Tensor:
        calls.append(call)
        return call.hidden * 1

    before, table.reference = table.reference, reference
    try:
        with use_backend(None), warnings.catch_warnings():
            warnings.simplefilter("error")
            for tokens in (fewest - 1, fewest):
                hidden = random_hidden(tokens, HIDDEN, seed=1).requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
                    run(op, hidden, make(op), 2, offsets=offsets_of([tokens]))
    finally:
        table.reference = before
    assert [len(call.hidden) for call in calls] == [fewest - 1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(8, 50)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    data=st.data(),
)
def test_any_shape(
    op: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    lengths: list[int],
    activation: str,
    data: st.DataObject,
) -> None:
    heads, eighths, hidden_size = sizes
    weights: Weights
    if op == "ffn":
        limit = heads * 17
        weights = random_ffn(limit, hidden_size, dtype=dtype, activation=activation)
    else:
        limit = heads
        weights = random_attention(limit, 8 * eighths, hidden_size, dtype=dtype)
    hidden = random_hidden(sum(lengths), hidden_size, dtype=dtype, seed=1)
    each = int32(*(data.draw(st.integers(1, limit)) for _ in lengths))
    # Of a handful of numbers, PyTorch may get each right by luck.
    check(op, hidden, weights, each, factor=8, offsets=offsets_of(lengths))
