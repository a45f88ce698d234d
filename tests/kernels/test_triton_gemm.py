"""The products of the Triton backend, on every path, epilogue and way to say a width.

Without a GPU they run in Triton's interpreter, which shows that the arithmetic and the addressing
are right, and nothing of a card.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels.dropout import apply_mask, hidden_uniform
from dynabert_kernels.layout import ACTIVATIONS
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.triton import configs, launch
from dynabert_kernels.triton.configs import LinearConfig
from dynabert_kernels.triton.launch import Dropout
from dynabert_kernels.triton.launch_gemm import columns_product, rows_gradient, rows_product
from dynabert_kernels.triton.row_tiles import RowTiles, row_tiles
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly, so that dtype is for cards alone.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
PATHS = {
    "pointers": LinearConfig(64, 32, 32, 4, 2),
    "descriptors": LinearConfig(64, 32, 32, 4, 2, descriptors=True),
    "halves": LinearConfig(64, 64, 32, 4, 2, descriptors=True, subtiles=2),
    "persistent": LinearConfig(64, 32, 32, 4, 2, descriptors=True, persistent=1),
}
SPLIT = {f"split{n}": LinearConfig(64, 32, 32, 4, 2, split_k=n) for n in (2, 8)}
# What F.gelu does in float64, by the names of `ACTIVATIONS`.
FUNCTIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
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


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """A persistent program gets several tiles."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "card", lambda device: (80, 2))


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def prefix_of_nan(rows, columns, dtype, seed=2):
    """A weight whose storage goes on with NaN after its rows."""
    storage = torch.full((rows + 9, columns), torch.nan, dtype=dtype, device=DEVICE)
    storage[:rows] = normal(rows, columns, dtype=dtype, seed=seed, scale=0.1)
    return storage


def assert_accurate(name, actual, function, *inputs):
    """`function` of `inputs` in their own dtype is plain PyTorch, in float64 the truth."""
    truth = function(*(tensor.double() for tensor in inputs))
    assert_as_accurate(name, actual, function(*inputs).to(actual.dtype), truth)


SIZES = pytest.mark.parametrize("size", [(1, 8, 8), (63, 40, 200), (130, 96, 64)], ids=str)


@pytest.mark.parametrize("path", PATHS)
@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, size, path):
    tokens, outputs, inputs = size
    x = normal(tokens, inputs + 8, dtype=dtype, seed=1)[:, :inputs]
    weight, bias = prefix_of_nan(outputs, inputs, dtype), normal(outputs, dtype=dtype)
    options = {"width": outputs // 4, "unit": 4, "config": PATHS[path]}
    actual = rows_product(x, weight, bias, **options)
    assert_accurate("rows", actual, F.linear, x, weight[:outputs], bias)
    out, before = rows_product(x, weight, bias, activation="relu", keep_before=True, **options)
    assert torch.equal(before, actual) and torch.equal(out, actual.relu())
    actual = rows_product(x, weight, None, **options)
    assert_accurate("rows without bias", actual, F.linear, x, weight[:outputs])


@pytest.mark.parametrize("path", [*PATHS, *SPLIT])
@SIZES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(dtype, size, path):
    tokens, outputs, inputs = size
    x, weight = normal(tokens, inputs, dtype=dtype, seed=1), prefix_of_nan(inputs, outputs, dtype)
    bias, residual = normal(outputs, dtype=dtype), normal(tokens, outputs, dtype=dtype, seed=3)
    config = (PATHS | SPLIT)[path]
    options = {"width": inputs // 8, "unit": 8, "config": config}
    actual = columns_product(x, weight, bias=bias, residual=residual, **options)
    if config.split_k > 1:
        assert actual.dtype == torch.float32 and len(actual) == config.split_k
        assert_accurate("sums", actual.sum(0).to(dtype), torch.matmul, x, weight[:inputs])
        return
    whole = lambda x, w, b, r: x @ w + b + r  # noqa: E731
    assert_accurate("columns", actual, whole, x, weight[:inputs], bias, residual)
    actual = columns_product(x, weight, bias=None, residual=None, **options)
    assert_accurate("product alone", actual, torch.matmul, x, weight[:inputs])
    wide = residual.float()
    actual = columns_product(x, weight, bias=None, residual=wide, **options)
    assert actual.dtype == torch.float32
    alone = lambda x, w, r: (x @ w).to(r.dtype) + r  # noqa: E731
    assert_accurate("float32 residual", actual, alone, x, weight[:inputs], wide)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_keeps_what_the_reference_keeps(path, dropout_p):
    seed = 2**40 + 7
    x, weight = normal(70, 16, seed=1), normal(16, 48, seed=2)
    bias, residual = normal(48, seed=3), normal(70, 48, seed=4)
    dropout = Dropout(dropout_p, torch.tensor([seed], device=DEVICE))
    options = {"width": 16, "bias": bias, "residual": residual, "config": PATHS[path]}
    actual = columns_product(x, weight, dropout=dropout, **options)
    numbers = hidden_uniform(seed, torch.arange(70, device=DEVICE), 48)
    expected = apply_mask(x @ weight + bias, numbers, dropout_p) + residual
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize(
    ("dtype", "path"),
    # In float32 just the epilogue differs, and one path has it.
    [(d, path) for d in DTYPES for path in PATHS if d.itemsize == 2 or path == "pointers"],
    ids=str,
)
def test_gradient(dtype, path, activation):
    tokens, outputs, inputs = 67, 40, 32
    gradient = normal(tokens, inputs, dtype=dtype, seed=1)
    weight = prefix_of_nan(outputs, inputs, dtype)
    before = normal(tokens, outputs, dtype=dtype, seed=3, scale=2.0)
    out, activated = rows_gradient(
        gradient, weight, before, width=outputs, activation=activation, config=PATHS[path]
    )

    def plain(gradient, weight, before):
        before = before.detach().requires_grad_()
        value = FUNCTIONS[activation](before)
        return torch.autograd.grad(value, before, gradient @ weight.T)[0]

    assert_accurate("gradient", out, plain, gradient, weight[:outputs], before)
    assert_accurate("activated", activated, FUNCTIONS[activation], before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", ["pointers", "descriptors"])
def test_activation_at_every_magnitude(path, activation):
    values = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-3e38, -60.0, 60.0, 3e38])])
    x = F.pad(values[:, None], (0, 3)).to(DEVICE)
    one, none = torch.eye(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    options = {"width": 4, "activation": activation, "config": PATHS[path]}
    actual = rows_product(x, one, none, **options)
    before = values.double().requires_grad_()
    truth = FUNCTIONS[activation](before)
    torch.testing.assert_close(actual[:, 0].cpu(), truth.float())
    slopes = torch.autograd.grad(truth.sum(), before)[0]
    ones = F.pad(torch.ones(len(values), 1, device=DEVICE), (0, 3))
    out, activated = rows_gradient(ones, one, x, **options)
    torch.testing.assert_close(activated, actual)
    # Beyond 1e19 a square overflows, in PyTorch too.
    torch.testing.assert_close(out[:-4, 0].cpu(), slopes[:-4].float())
    torch.testing.assert_close(out[-3:-1, 0].cpu(), slopes[-3:-1].float())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_half_precision_is_as_good_as_its_rounding(activation):
    x = torch.linspace(-8, 8, 801, dtype=torch.float16).to(DEVICE)[:, None]
    one, none = torch.ones(1, 1, dtype=x.dtype, device=DEVICE), torch.zeros(1, device=DEVICE)
    actual = rows_product(x, one, none.half(), width=1, activation=activation).double()
    error = (actual - FUNCTIONS[activation](x.double())).abs()
    assert (error <= 5e-5 + actual.abs() * 2**-11).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_activation_keeps_what_is_not_finite(dtype, activation):
    x = torch.tensor([[torch.inf], [torch.nan]], dtype=dtype, device=DEVICE)
    one, none = torch.ones(1, 1, dtype=dtype, device=DEVICE), torch.zeros(1, device=DEVICE)
    actual = rows_product(x, one, none.to(dtype), width=1, activation=activation)
    assert actual[0, 0] == torch.inf and actual[1, 0].isnan()


def test_float32_precision_follows_pytorch():
    assert launch.input_precision(torch.float32) == "tf32x3"
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.input_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def expected_tiles(offsets, widths, total_tokens, limit, block_m):
    """`row_tiles` in plain Python."""
    num_unused = -(-total_tokens // block_m) + (len(widths) if len(widths) > 1 else 0)
    if len(widths) == 1:
        widths = widths * (len(offsets) - 1)
    runs = []
    for first, end, width in zip(offsets, offsets[1:], widths, strict=False):
        width = min(max(width, 0), limit)
        if runs and runs[-1][2] == width:
            runs[-1][1] = end
        else:
            runs.append([first, end, width])
    tiles = [
        [first, min(first + block_m, end), width]
        for run, end, width in runs
        for first in range(run, end, block_m)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return tiles + [[0, 0, 0]] * (num_unused - len(tiles))


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize(
    ("lengths", "widths"),
    [
        ([5], [3]),
        ([64, 64, 300, 1], [3]),
        ([], [3]),
        ([0, 0], [1, 2]),
        ([7, 0, 130, 64, 1], [3, 3, -1, 99, 2]),
        ([100, 28, 1, 0, 200, 64], [2, 2, 2, 1, 2, 2]),
        ([33, 1, 150] * 50, [4, 4, 1, 2, 0] * 30),
    ],
    ids=lambda value: f"{len(value)}of{sum(value)}",
)
def test_row_tiles(lengths, widths, block_m):
    offsets = offsets_of(lengths, DEVICE)
    total_tokens = sum(lengths) + 70
    device_widths = torch.tensor(widths, dtype=torch.int32, device=DEVICE)
    tiles = row_tiles(offsets, device_widths, total_tokens, 4, block_m=block_m)
    assert tiles[1:] == (block_m, 4, len(widths) == 1)
    expected = expected_tiles(offsets.tolist(), widths, total_tokens, 4, block_m)
    assert tiles.table.tolist() == expected


def test_row_tiles_are_lower_for_few_tokens():
    offsets, widths = offsets_of([9], DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    assert row_tiles(offsets, widths, 128, 4).block_m == 64
    assert row_tiles(offsets, widths, 16384, 4).block_m == 128


# Lengths and widths of three sequences; ten rows more than the sequences need.
LENGTHS, WIDTHS, LIMIT = [70, 3, 70], [2, 3, 1], 4
TILED = {name: replace(PATHS[name], persistent=0) for name in ("pointers", "descriptors", "halves")}
# Float32 differs in its results' type alone.
TILED_CASES = [
    (dtype, path) for dtype in DTYPES for path in TILED if path == "pointers" or dtype.itemsize == 2
]


def ragged(widths, unit, dtype, seed):
    """Tiles, the width of each row in channels, and rows that are NaN beyond it."""
    offsets = offsets_of(LENGTHS, DEVICE)
    total_tokens = sum(LENGTHS) + 10
    tiles = row_tiles(
        offsets, torch.tensor(widths, dtype=torch.int32, device=DEVICE), total_tokens, LIMIT
    )
    each = torch.tensor(widths * (3 // len(widths)), device=DEVICE)
    width_of = each.repeat_interleave(torch.tensor(LENGTHS, device=DEVICE)) * unit
    width_of = F.pad(width_of, (0, 10))
    rows = normal(total_tokens, LIMIT * unit, dtype=dtype, seed=seed)
    beyond = torch.arange(LIMIT * unit, device=DEVICE) >= width_of[:, None]
    return tiles, beyond, rows.masked_fill(beyond, torch.nan)


@pytest.mark.parametrize("unit", [12, 32])
@pytest.mark.parametrize("widths", [[2], WIDTHS], ids=["uniform", "each"])
@pytest.mark.parametrize(("dtype", "path"), TILED_CASES, ids=str)
def test_rows_of_several_widths(dtype, path, widths, unit):
    tiles, beyond, before = ragged(widths, unit, dtype, seed=4)
    x = normal(len(before), 48, dtype=dtype, seed=1)
    x[sum(LENGTHS) :] = torch.nan
    weight, bias = normal(LIMIT * unit, 48, dtype=dtype, seed=2, scale=0.2), normal(LIMIT * unit)
    bias = bias.to(dtype)
    weight[max(widths) * unit :] = torch.nan
    options = {"width": tiles, "unit": unit, "config": TILED[path]}
    out, kept = rows_product(x, weight, bias, activation="relu", keep_before=True, **options)
    inside = ~beyond
    assert_accurate("out", out[inside], lambda *t: F.linear(*t).relu()[inside], x, weight, bias)
    assert_accurate("before", kept[inside], lambda *t: F.linear(*t)[inside], x, weight, bias)
    out, activated = rows_gradient(x, weight, before, activation="relu", **options)
    product = lambda x, w, b: ((x @ w.T) * (b > 0))[inside]  # noqa: E731
    assert_accurate("gradient", out[inside], product, x, weight, before)
    assert torch.equal(activated[inside], before[inside].relu())


@pytest.mark.parametrize("unit", [12, 32])
@pytest.mark.parametrize("widths", [[2], WIDTHS], ids=["uniform", "each"])
@pytest.mark.parametrize(("dtype", "path"), [*TILED_CASES, (torch.float16, "split2")], ids=str)
def test_columns_of_several_widths(dtype, path, widths, unit):
    tiles, beyond, x = ragged(widths, unit, dtype, seed=1)
    real = sum(LENGTHS)
    weight, bias = normal(LIMIT * unit, 72, dtype=dtype, seed=2, scale=0.2), normal(72, dtype=dtype)
    zeroed = weight.clone()
    weight[max(widths) * unit :] = torch.nan
    residual = normal(len(x), 72, dtype=dtype, seed=3)
    options = {"width": tiles, "unit": unit, "config": (TILED | SPLIT)[path]}
    actual = columns_product(x, weight, bias=bias, residual=residual, **options)
    narrow = x.masked_fill(beyond, 0.0)[:real]
    if path == "split2":
        assert_accurate("sums", actual.sum(0)[:real].to(dtype), torch.matmul, narrow, zeroed)
        return
    whole = lambda x, w, b, r: x @ w + b + r  # noqa: E731
    assert_accurate("columns", actual[:real], whole, narrow, zeroed, bias, residual[:real])


@pytest.mark.parametrize("path", PATHS)
def test_nothing_to_compute_has_a_defined_result(path):
    config, weight, bias = PATHS[path], normal(8, 48), normal(48)
    assert rows_product(normal(0, 48), weight, None, width=8, config=config).shape == (0, 8)
    assert rows_product(normal(5, 48), weight, None, width=0, config=config).shape == (5, 0)
    residual = normal(5, 48, seed=1)
    actual = columns_product(
        normal(5, 0), weight, width=0, bias=bias, residual=residual, config=config
    )
    torch.testing.assert_close(actual, residual + bias)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120], ids="sm{}".format)
def test_small_batches_are_split_to_fill_a_card(capability):
    def config(form, tokens, inputs):
        return configs.linear_config(
            form,
            tokens=tokens,
            outputs=768,
            inputs=inputs,
            dtype=torch.bfloat16,
            capability=capability,
            num_sms=132,
            aligned=True,
        )

    assert config("columns", 128, 3072).split_k == config("columns", 128, 192).split_k == 2
    assert config("columns", 128, 64).split_k == 1
    assert config("rows", 128, 3072).split_k == config("columns", 1024, 3072).split_k == 1
    assert config("columns", 16384, 768).descriptors == (capability == 90)


@pytest.mark.parametrize("form", ["rows", "gradient", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("block_m", [64, 128])
def test_tiles_of_rows_say_how_high_a_tile_is(block_m, aligned, dtype, form):
    for capability, tokens in product((80, 90), (128, 1024, 4096, 65536)):
        config = configs.linear_config(
            form,
            tokens=tokens,
            outputs=768,
            inputs=768,
            dtype=dtype,
            capability=capability,
            num_sms=132,
            aligned=aligned,
            block_m=block_m,
        )
        assert config.block_m == block_m


def test_a_table_of_other_tiles_is_refused():
    tiles = RowTiles(torch.zeros(1, 3, dtype=torch.int32, device=DEVICE), 128, 4)
    with pytest.raises(AssertionError):
        rows_product(normal(5, 8), normal(4, 8), None, width=tiles, config=PATHS["pointers"])


def test_only_columns_split_k():
    x, weight = normal(5, 64), normal(4, 64)
    with pytest.raises(AssertionError):
        rows_product(x, weight, None, width=4, config=SPLIT["split2"])
