"""The gradient of elastic weights on Triton, in Triton's interpreter or on a card."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.triton import launch
from dynabert_kernels.triton.row_tiles import row_tiles
from dynabert_kernels.triton.weight_gradient import WeightGradientConfig, weight_gradient
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
PATHS = {
    "pointers": WeightGradientConfig(16, 32, 32, 4, 2, programs=1),
    "descriptors": WeightGradientConfig(16, 64, 32, 4, 2, programs=1, descriptors=True),
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


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def apart(matrix):
    """The same numbers with rows 16 elements further apart, NaN between them."""
    wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 16), torch.nan)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def assert_gradient(actual, rows, inputs, out_rows, dtype):
    """`rows` hold zero where a token does not reach."""
    out, sums = actual
    missing = out_rows - rows.shape[1]
    for name, got, left, right in (
        ("weight", out, rows, inputs),
        ("bias", sums, rows, torch.ones_like(inputs[:, :1])),
    ):
        if got is None:
            continue
        truth = torch.nn.functional.pad(left.double().T @ right.double(), (0, 0, 0, missing))
        plain = torch.nn.functional.pad(left.T @ right, (0, 0, 0, missing))
        if name == "bias":
            assert got.dtype == torch.float32
            got, truth, plain = got[:, None].to(rows.dtype), truth, plain
        else:
            assert got.dtype == dtype
        if rows.shape[0] > 0:
            assert_as_accurate(name, got.to(plain.dtype), plain, truth)
        assert torch.equal(got[rows.shape[1] :], torch.zeros_like(got[rows.shape[1] :])), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("tokens", "channels", "unit", "width", "limit"),
    [
        (7, 8, 1, 8, 8),
        (63, 40, 24, 2, 3),
        (70, 72, 1, 64, 130),
        (205, 40, 16, 3, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_sms", [1, 7, 108], ids="sms{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_width(monkeypatch, dtype, num_sms, tokens, channels, unit, width, limit, path):
    monkeypatch.setattr(launch, "card", lambda device: (80, num_sms))
    rows = apart(normal(tokens, width * unit, dtype=dtype, seed=1))
    inputs = apart(normal(tokens, channels, dtype=dtype, seed=2))
    options = {"width": width, "unit": unit, "limit": limit, "config": PATHS[path]}
    actual = weight_gradient(rows, inputs, dtype=dtype, with_bias=True, **options)
    assert_gradient(actual, rows, inputs, limit * unit, dtype)
    if num_sms == 7:
        alone, none = weight_gradient(rows, inputs, dtype=torch.float32, with_bias=False, **options)
        assert none is None and torch.equal(alone.to(dtype), actual[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype, path):
    rows, inputs = (torch.arange(-8, 8, device=DEVICE).to(dtype)[None] for _ in range(2))
    out, sums = weight_gradient(
        rows, inputs, width=16, limit=17, dtype=dtype, with_bias=True, config=PATHS[path]
    )
    assert torch.equal(out[:16], rows.T * inputs) and torch.equal(sums[:16], rows[0].float())
    assert not out[16].any() and not sums[16].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_no_wide_copy_can_fetch(dtype):
    rows, inputs = normal(37, 29, dtype=dtype, seed=1), normal(37, 45, dtype=dtype, seed=2)
    actual = weight_gradient(rows, inputs, width=29, limit=31, dtype=dtype, with_bias=True)
    assert_gradient(actual, rows, inputs, 31, dtype)


@pytest.mark.parametrize(
    ("tokens", "width"), [(0, 3), (5, 0), (0, 0)], ids=lambda value: f"{value}"
)
def test_nothing_reaches(tokens, width):
    rows, inputs = normal(tokens, width * 8), normal(tokens, 24)
    out, sums = weight_gradient(
        rows, inputs, width=width, unit=8, limit=3, dtype=torch.float16, with_bias=True
    )
    assert torch.equal(out, torch.zeros(24, 24, dtype=torch.float16, device=DEVICE))
    assert torch.equal(sums, torch.zeros(24, device=DEVICE))
    none, _ = weight_gradient(
        rows[:, :0], inputs, width=0, unit=8, limit=0, dtype=torch.float16, with_bias=False
    )
    assert none.shape == (0, 24)


def ragged_case(lengths, widths, unit, limit, channels, dtype, *, unused=9):
    """Poisoned rows, inputs, tiles, and the rows with zero where the poison is."""
    tokens = sum(lengths) + unused
    of_token = torch.zeros(tokens, dtype=torch.long)
    per_sequence = widths * len(lengths) if len(widths) == 1 else widths
    of_token[: sum(lengths)] = torch.repeat_interleave(
        torch.tensor(per_sequence, dtype=torch.long), torch.tensor(lengths, dtype=torch.long)
    )
    live = torch.arange(limit * unit)[None, :] < of_token[:, None] * unit
    live = live.to(DEVICE)
    clean = normal(tokens, limit * unit, dtype=dtype, seed=1).masked_fill(~live, 0)
    inputs = normal(tokens, channels, dtype=dtype, seed=2)
    poisoned = clean.masked_fill(~live, torch.nan)
    inputs_poisoned = inputs.clone()
    inputs_poisoned[sum(lengths) :] = torch.nan
    tiles = row_tiles(
        offsets_of(lengths, DEVICE),
        torch.tensor(widths, dtype=torch.int32, device=DEVICE),
        tokens,
        limit,
        block_m=64,
    )
    return apart(poisoned), apart(inputs_poisoned), tiles, clean, inputs


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("lengths", "widths", "unit", "limit"),
    [
        pytest.param([64, 32, 64], [4, 4, 2], 16, 4, id="whole-steps"),
        pytest.param([7, 0, 70, 33], [3, 1, 1, 5], 24, 5, id="heads"),
        pytest.param([40, 70, 1, 19], [70, 33, 64, 0], 1, 104, id="neurons"),
        pytest.param([70, 40, 9, 40, 48], [100, 90, 80, 75, 70], 1, 104, id="widths-of-one-block"),
        pytest.param([50, 60], [2], 40, 3, id="one-width"),
        pytest.param([20, 20], [0], 40, 3, id="no-width"),
        pytest.param([], [3], 8, 3, id="no-sequence"),
    ],
)
@pytest.mark.parametrize("num_sms", [1, 7, 108], ids="sms{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_widths(monkeypatch, dtype, num_sms, lengths, widths, unit, limit, path):
    # How many multiprocessors there are decides which steps one program adds.
    monkeypatch.setattr(launch, "card", lambda device: (80, num_sms))
    rows, inputs, tiles, clean_rows, clean_inputs = ragged_case(
        lengths, widths, unit, limit, 24, dtype
    )
    options = {"width": tiles, "unit": unit, "limit": limit, "config": PATHS[path]}
    actual = weight_gradient(rows, inputs, dtype=dtype, with_bias=True, **options)
    assert_gradient(actual, clean_rows, clean_inputs, limit * unit, dtype)
    if num_sms == 7:
        again, none = weight_gradient(rows, inputs, dtype=dtype, with_bias=False, **options)
        assert none is None and torch.equal(again, actual[0])


def test_many_tiles():
    lengths = [1 + i % 5 for i in range(90)]
    widths = [i * 7 % 5 for i in range(90)]
    rows, inputs, tiles, clean_rows, clean_inputs = ragged_case(
        lengths, widths, 16, 4, 24, torch.float32
    )
    config = WeightGradientConfig(16, 32, 32, 4, 2, programs=1)
    actual = weight_gradient(
        rows,
        inputs,
        width=tiles,
        unit=16,
        limit=4,
        dtype=torch.float32,
        with_bias=True,
        config=config,
    )
    assert_gradient(actual, clean_rows, clean_inputs, 64, torch.float32)
