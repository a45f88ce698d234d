"""The C++ kernels on every instruction set this CPU has: one source, five compilations.

What all backends owe is tested in test_ffn.py and test_attention.py, on the widest set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dynabert_kernels import PackedAttention, PackedFFN, _extension, attention, ffn, use_backend
from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.testing import (
    assert_as_accurate,
    converted,
    nan_tails,
    random_attention,
    random_ffn,
    random_hidden,
)
from dynabert_kernels.varlen import offsets_of

ISAS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
COMPUTE = ["float32", "bfloat16", "int8"]
# Neither sizes nor prefixes are whole panels, pairs or groups; the last sequence is longer than the
# keys of one block.
NEURONS, ACTIVE_NEURONS = 600, 523
LENGTHS = [1, 0, 63, 7, 520]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    reason = _extension.extension_error()
    if reason is not None:
        pytest.skip(reason)
    return _extension.cpu_extension()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, module: ModuleType) -> Iterator[str]:
    """Each instruction set by name, in force for the test."""
    name = str(request.param)
    if name not in module.supported_isas():
        pytest.skip(f"this CPU has no {name}")
    before = module.isa_name()
    module.force_isa(name)
    yield name
    module.force_isa(before)


def dtype_of(compute: str) -> torch.dtype:
    return torch.bfloat16 if compute == "bfloat16" else torch.float32


def ffn_inputs(tokens: int, compute: str, hidden_size: int = 72) -> tuple[Tensor, PackedFFN]:
    dtype = dtype_of(compute)
    weights = random_ffn(NEURONS, hidden_size, dtype=dtype)
    hidden = random_hidden(tokens, hidden_size, dtype=dtype, seed=1)
    return hidden, replace(weights, quantization="int8" if compute == "int8" else None)


def attention_inputs(compute: str, head_dim: int) -> tuple[Tensor, PackedAttention]:
    dtype = dtype_of(compute)
    weights = random_attention(3, head_dim, 72, dtype=dtype)
    hidden = random_hidden(sum(LENGTHS), 72, dtype=dtype, seed=1)
    return hidden, replace(weights, quantization="int8" if compute == "int8" else None)


@torch.no_grad()
def run_ffn(backend: str, hidden: Tensor, weights: PackedFFN) -> Tensor:
    with use_backend(backend):
        return ffn(hidden, weights, intermediate_size=ACTIVE_NEURONS)


@torch.no_grad()
def run_attention(backend: str, hidden: Tensor, weights: PackedAttention) -> Tensor:
    offsets, longest = offsets_of(LENGTHS), max(LENGTHS)
    with use_backend(backend):
        return attention(hidden, weights, num_heads=2, cu_seqlens=offsets, max_seqlen=longest)


def assert_rows_agree(actual: Tensor, expected: Tensor) -> None:
    """Integers are exact, so rows agree to float32's rounding; but where a number to quantise lies
    between two integers, rounding may choose the other, and the row is off by a quantum."""
    off = ((actual - expected).abs() > 1e-5).any(1)
    assert off.float().mean() <= 0.25, f"{int(off.sum())} of {len(off)} rows differ"


@pytest.mark.parametrize("hidden_size", [72, 77], ids="c{}".format)
@pytest.mark.parametrize("tokens", [1, 7, 63], ids="t{}".format)
@pytest.mark.parametrize("compute", COMPUTE)
def test_ffn_is_as_accurate_as_the_reference(
    isa: str, module: ModuleType, compute: str, tokens: int, hidden_size: int
) -> None:
    hidden, weights = ffn_inputs(tokens, compute, hidden_size)
    actual = run_ffn("cpu", hidden, weights)
    module.force_isa("scalar")
    scalar = run_ffn("cpu", hidden, weights)
    wide = replace(converted(weights, torch.float64), quantization=None)
    truth = run_ffn("reference", hidden.double(), wide)
    reference = run_ffn("reference", hidden, weights)
    assert_as_accurate("output, against the reference", actual, reference, truth)
    assert_as_accurate("output, against scalar", actual, scalar, truth)
    if compute == "int8" and tokens > 1:
        assert_rows_agree(actual, reference)
        assert_rows_agree(actual, scalar)


@pytest.mark.parametrize("head_dim", [8, 24, 64], ids="d{}".format)
@pytest.mark.parametrize("compute", COMPUTE)
def test_attention_is_as_accurate_as_the_reference(
    isa: str, module: ModuleType, compute: str, head_dim: int
) -> None:
    hidden, weights = attention_inputs(compute, head_dim)
    actual = run_attention("cpu", hidden, weights)
    module.force_isa("scalar")
    scalar = run_attention("cpu", hidden, weights)
    wide = replace(converted(weights, torch.float64), quantization=None)
    truth = run_attention("reference", hidden.double(), wide)
    reference = run_attention("reference", hidden, weights)
    assert_as_accurate("output, against the reference", actual, reference, truth)
    assert_as_accurate("output, against scalar", actual, scalar, truth)
    if compute == "int8":
        assert_rows_agree(actual, reference)
        assert_rows_agree(actual, scalar)


# From no two vectors of channels mixed to sixteen, in one block or several.
@pytest.mark.parametrize("hidden_size", [48, 96, 64, 128, 256, 512], ids="c{}".format)
def test_int8_spreads_channels_as_the_reference_does(isa: str, hidden_size: int) -> None:
    hidden, neurons = ffn_inputs(25, "int8", hidden_size)
    hidden[:, hidden_size // 3] *= 20
    heads = replace(random_attention(2, 8, hidden_size), quantization="int8")

    def run(backend: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), use_backend(backend):
            offsets = offsets_of([25])
            attended = attention(hidden, heads, num_heads=2, cu_seqlens=offsets, max_seqlen=25)
            return attended, ffn(hidden, neurons, intermediate_size=100)

    attended, fed = run("cpu")
    expected = run("reference")
    assert_rows_agree(attended, expected[0])
    assert_rows_agree(fed, expected[1])
    hidden[:3, 5] = torch.tensor([math.nan, math.inf, -math.inf])
    broken = run("cpu")[1]
    assert broken[:3].isnan().all()
    assert torch.equal(broken[3:], fed[3:])


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_token_has_the_same_bits_in_any_batch_on_any_threads(isa: str, compute: str) -> None:
    hidden, weights = ffn_inputs(63, compute)
    together = run_ffn("cpu", hidden, weights)
    apart = torch.cat([run_ffn("cpu", part, weights) for part in hidden.split([1, 5, 40, 17])])
    torch.set_num_threads(1)
    assert torch.equal(apart, together)
    assert torch.equal(run_ffn("cpu", hidden, weights), together)


@pytest.mark.parametrize("compute", COMPUTE)
def test_sequences_have_the_same_bits_in_any_batch_on_any_threads(isa: str, compute: str) -> None:
    hidden, weights = attention_inputs(compute, 24)
    together = run_attention("cpu", hidden, weights)
    with torch.no_grad(), use_backend("cpu"):
        alone = [
            attention(
                part, weights, num_heads=2, cu_seqlens=offsets_of([len(part)]), max_seqlen=len(part)
            )
            for part in hidden.split(LENGTHS)
        ]
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(run_attention("cpu", hidden, weights), together)


def test_bfloat16_is_float32_rounded_to_nearest_even(isa: str) -> None:
    hidden, weights = ffn_inputs(63, "bfloat16", hidden_size=77)
    with torch.autocast("cpu", torch.bfloat16):
        wide = run_ffn("cpu", hidden.float(), weights)
    assert wide.dtype == torch.float32
    assert torch.equal(run_ffn("cpu", hidden, weights), wide.bfloat16())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_nan_beyond_the_prefix_changes_nothing(isa: str, compute: str) -> None:
    hidden, weights = ffn_inputs(7, compute)
    expected = run_ffn("cpu", hidden, weights)
    assert torch.equal(run_ffn("cpu", hidden, nan_tails(weights, ACTIVE_NEURONS)), expected)
    hidden, heads = attention_inputs(compute, 24)
    expected = run_attention("cpu", hidden, heads)
    assert torch.equal(run_attention("cpu", hidden, nan_tails(heads, 2)), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("compute", COMPUTE)
def test_a_token_that_is_no_number_spoils_itself_alone(
    isa: str, compute: str, value: float
) -> None:
    hidden, weights = ffn_inputs(23, compute)
    expected = run_ffn("cpu", hidden, weights)
    hidden[3, 5] = value
    actual = run_ffn("cpu", hidden, weights)
    assert actual[3].isnan().all()
    rest = torch.arange(23) != 3
    assert torch.equal(actual[rest], expected[rest])


@pytest.mark.parametrize("compute", COMPUTE)
def test_nan_in_a_sequence_spoils_that_one_alone(isa: str, compute: str) -> None:
    hidden, weights = attention_inputs(compute, 24)
    expected = run_attention("cpu", hidden, weights)
    hidden[20, 5] = math.nan
    actual = run_attention("cpu", hidden, weights)
    rest = torch.ones(len(hidden), dtype=torch.bool)
    rest[1:64] = False
    assert actual[1:64].isnan().all()
    assert torch.equal(actual[rest], expected[rest])


def numbers() -> Tensor:
    """A dense grid where the activations bend, and every exponent there is, of both signs."""
    grid = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64).float()
    powers = torch.arange(0, 0x7F800000, 0x10001, dtype=torch.int32).view(torch.float32)
    return torch.cat([grid, powers, -powers])


def exact(activation: str, x: Tensor) -> Tensor:
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "gelu":
        return 0.5 * x * torch.erfc(-x / math.sqrt(2))
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_close_to_float64(isa: str, module: ModuleType, activation: str) -> None:
    x = numbers()
    actual, truth = module.activate(activation, x).double(), exact(activation, x.double())
    error = (actual - truth).abs() / x.double().abs().clamp(min=1)
    allowed = 0.0 if activation == "relu" else 2e-7
    assert error.max() <= allowed, f"{error.max():.3e} at {x[error.argmax()]}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_what_is_no_finite_number(
    isa: str, module: ModuleType, activation: str
) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    actual = module.activate(activation, x)
    torch.testing.assert_close(
        actual, torch.tensor([math.inf, 0.0, math.nan, 0.0]), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_does_not_depend_on_the_place_in_a_vector(
    isa: str, module: ModuleType, activation: str
) -> None:
    x = random_hidden(1, 37)[0]
    whole = module.activate(activation, x)
    for first, last in [(0, 1), (3, 18), (5, 37), (36, 37)]:
        assert torch.equal(module.activate(activation, x[first:last]), whole[first:last])
