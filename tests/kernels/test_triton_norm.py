"""The row norm's Triton kernels, forward and backward, in Triton's interpreter or on a card."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels.dropout import hidden_uniform
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.triton.launch import Dropout
from dynabert_kernels.triton.launch_norm import NormForward, norm_gradient, residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
EPS = 1e-5

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


def seeded(p):
    return Dropout(p, torch.tensor([2**40 + 7], device=DEVICE)) if p is not None else None


def mask_of(dropout, rows, channels):
    """What a kernel multiplies by, float64: zero or the scale of what is kept."""
    if dropout is None:
        return torch.ones(rows, channels, dtype=torch.float64, device=DEVICE)
    numbers = hidden_uniform(int(dropout.seed), torch.arange(rows, device=DEVICE), channels)
    return (numbers > dropout.p).double() / max(1.0 - dropout.p, 1e-9)


def bound(num_tokens):
    offsets = torch.tensor([0, num_tokens], dtype=torch.int32, device=DEVICE)
    return offsets[-1:]


@pytest.mark.parametrize("rows", [0, 7], ids="t{}".format)
@pytest.mark.parametrize("channels", [1, 77, 128], ids="c{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_a_total(dtype, channels, rows):
    residual = normal(rows, channels + 3, dtype=dtype, seed=1)[:, :channels]
    bias, weight, shift = (normal(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    x = normal(rows, channels, dtype=dtype, seed=5) + 3
    out, total = residual_norm(
        x, bias, residual, weight, shift, EPS, dropout=seeded(0.5), keep_total=True
    )
    assert total is x
    norm = lambda t, w, b: F.layer_norm(t, (channels,), w, b, EPS)  # noqa: E731
    truth = norm(x.double(), weight.double(), shift.double())
    assert_as_accurate("norm", out, norm(x, weight, shift), truth)


@pytest.mark.parametrize("p", [None, 0.0, 0.3, 1.0], ids="p{}".format)
@pytest.mark.parametrize(("parts", "channels"), [(1, 77), (2, 770), (8, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_partial_sums(dtype, parts, channels, p):
    residual = normal(7, channels + 3, dtype=dtype, seed=1)[:, :channels]
    bias, weight, shift = (normal(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    x, dropout = normal(parts, 7, channels, seed=5), seeded(p)
    result = residual_norm(x, bias, residual, weight, shift, EPS, dropout=dropout, keep_total=True)
    assert isinstance(result, NormForward)
    truth = (x.double().sum(0) + bias) * mask_of(dropout, 7, channels) + residual
    assert_as_accurate("total", result.total, truth.to(dtype), truth)
    norm = lambda t, w, b: F.layer_norm(t, (channels,), w, b, EPS)  # noqa: E731
    plain = norm(truth.to(dtype), weight, shift)
    wanted = norm(truth, weight.double(), shift.double())
    assert_as_accurate("norm", result.out, plain, wanted)
    alone = residual_norm(x, bias, residual, weight, shift, EPS, dropout=dropout)
    assert torch.equal(alone, result.out)


def test_the_residual_says_the_dtype():
    x, bias, weight, shift = normal(2, 5, 48, seed=1), *(normal(48, seed=s) for s in (2, 3, 4))
    residual = normal(5, 48, seed=5)
    out, total = residual_norm(
        x, bias.half(), residual, weight.half(), shift.half(), EPS, keep_total=True
    )
    truth = x.double().sum(0) + bias.half() + residual
    assert_as_accurate("total", total, truth.float(), truth)
    norm = F.layer_norm(truth, (48,), weight.half().double(), shift.half().double(), EPS)
    assert_as_accurate("norm", out, norm.float(), norm)


@pytest.mark.parametrize("parts", [0, 2], ids="parts{}".format)
def test_rows_past_the_end_are_not_computed(parts):
    rows, used = 21, 13
    x = normal(*[parts] * (parts > 0), rows, 40, seed=1)
    residual, vector = normal(rows, 40, seed=2), normal(40, seed=3)
    whole = residual_norm(x, vector, residual, vector, vector, EPS)
    x[..., used:, :] = torch.nan
    residual[used:] = torch.nan
    out = residual_norm(x, vector, residual, vector, vector, EPS, num_tokens=bound(used))
    assert torch.equal(out[:used], whole[:used])
    # The fresh memory of this test is NaN.
    assert out[used:].isnan().all()


def plain_gradients(gradient, total, weight, mask):
    """By autograd in the dtype of the arguments; `mask` is what dropout multiplied by."""
    shift = torch.zeros_like(weight).requires_grad_()
    total, weight = (tensor.detach().requires_grad_() for tensor in (total, weight))
    out = F.layer_norm(total, (total.shape[1],), weight, shift, EPS)
    by_total, by_weight, by_shift = torch.autograd.grad(out, (total, weight, shift), gradient)
    projected = by_total * mask.to(by_total.dtype)
    return by_total, projected, by_weight, by_shift, projected.sum(0)


@pytest.mark.parametrize("p", [None, 0.3], ids="p{}".format)
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (7, 77), (203, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, rows, channels, p):
    dropout = seeded(p)
    mask = mask_of(dropout, rows, channels)
    gradient = normal(rows, channels + 5, dtype=dtype, seed=1)[:, :channels]
    total = normal(rows, channels + 3, dtype=dtype, seed=2)[:, :channels] + 1
    weight = normal(channels, dtype=dtype, seed=3)
    actual = norm_gradient(gradient, total, weight, EPS, dropout=dropout, projected_dtype=dtype)
    plain = plain_gradients(gradient, total, weight, mask)
    truth = plain_gradients(gradient.double(), total.double(), weight.double(), mask)
    assert (actual.projected is actual.total) == (p is None)
    for name, got, by_torch, wanted in zip(actual._fields, actual, plain, truth, strict=True):
        if got.dim() == 1:
            assert got.dtype == torch.float32
            got = got.to(dtype)
        # The interpreter adds a column one number after the other, PyTorch in pairs.
        factor = 4.0 if got.dim() == 1 and DEVICE == "cpu" else 2.0
        assert_as_accurate(name, got, by_torch, wanted, factor=factor)
    again = norm_gradient(gradient, total, weight, EPS, dropout=dropout, projected_dtype=dtype)
    assert all(map(torch.equal, actual, again))


def test_gradients_of_no_tokens_are_zero():
    none, weight = normal(0, 40), normal(40)
    actual = norm_gradient(none, none, weight, EPS, dropout=None, projected_dtype=torch.float16)
    assert actual.projected.shape == (0, 40) and actual.projected.dtype == torch.float16
    for vector in actual[2:]:
        assert torch.equal(vector, torch.zeros(40, device=DEVICE))


@pytest.mark.parametrize("used", [0, 13], ids="used{}".format)
def test_gradients_leave_rows_past_the_end_out(used):
    gradient, total, weight = normal(41, 40, seed=1), normal(41, 40, seed=2), normal(40, seed=3)
    gradient[used:] = torch.nan
    total[used:] = torch.nan
    options = {"dropout": seeded(0.3), "projected_dtype": torch.float16}
    actual = norm_gradient(gradient, total, weight, EPS, num_tokens=bound(used), **options)
    alone = norm_gradient(gradient[:used], total[:used], weight, EPS, **options)
    for name, got, wanted in zip(actual._fields, actual, alone, strict=True):
        if got.dim() == 2:
            assert torch.equal(got[:used], wanted), name
            assert got[used:].isnan().all()
        else:
            assert_as_accurate(name, got, wanted, wanted.double())


def test_a_row_without_variance_and_no_epsilon_at_the_end():
    gradient, total = normal(3, 40, seed=1), normal(3, 40, seed=2)
    weight = normal(40, seed=3)
    actual = norm_gradient(
        gradient, total, weight, 0.0, dropout=None, projected_dtype=torch.float32
    )
    assert all(tensor.isfinite().all() for tensor in actual)
