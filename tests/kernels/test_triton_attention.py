"""The Triton attention core and its gradient: every path, device-side head counts, dropout.

Truth is float64 PyTorch; dropout is that of `dynabert_kernels.dropout`. Without a GPU the kernels
run in Triton's interpreter.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels import dropout as numbers
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.triton import availability
from dynabert_kernels.triton.configs import AttentionConfig
from dynabert_kernels.triton.launch import Dropout
from dynabert_kernels.triton.launch_attention import attention_core, attention_core_gradient
from dynabert_kernels.varlen import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly, so that dtype is for cards alone.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
SEED = (7 << 32) + 5
SINGLE = AttentionConfig(16, 16, 4, 1)
GROUPED = AttentionConfig(16, 16, 4, 2, heads=2)
STREAMED = AttentionConfig(32, 16, 4, 2)

pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not _env.triton_interpret(), reason="TRITON_INTERPRET is not set"
    ),
    # NumPy warns of the zeros that masked queries divide by.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def plain_core(
    qkv: Tensor, lengths: list[int], heads: list[int], dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Context and log2 of the sum of exp(score); zeros where no head is in use."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_zeros(qkv.shape[0], qkv.shape[1], qkv.shape[3])
    log_sum = torch.zeros(qkv.shape[1], qkv.shape[0], dtype=wide, device=qkv.device)
    start = 0
    for length, used in zip(lengths, heads, strict=True):
        here = slice(start, start + length)
        q, k, v = qkv[here, :used].permute(2, 1, 0, 3)
        scores = (q @ k.mT).to(wide) * qkv.shape[3] ** -0.5
        probabilities = scores.softmax(-1)
        if dropout_p > 0:
            queries = torch.arange(start, start + length, device=qkv.device)[None]
            drawn = numbers.attention_uniform(SEED, queries, used, length)[0]
            probabilities = numbers.apply_mask(probabilities, drawn, dropout_p)
        out[here, :used] = (probabilities.to(v.dtype) @ v).transpose(0, 1)
        log_sum[:used, here] = scores.logsumexp(-1) * math.log2(math.e)
        start += length
    return out, log_sum


def dropout_of(dropout_p: float) -> Dropout | None:
    if dropout_p == 0:
        return None
    return Dropout(dropout_p, torch.tensor([SEED], device=DEVICE))


def check(
    dtype: torch.dtype,
    lengths: list[int],
    *,
    head_dim: int = 32,
    heads: int = 3,
    counts: list[int] | None = None,
    dropout_p: float = 0.0,
    config: AttentionConfig | None = None,
    backward: AttentionConfig | None = None,
    spare: int = 0,
) -> None:
    """Forward and backward against PyTorch, with NaN in unused heads and in `spare` rows."""
    tokens = sum(lengths)
    used = [heads] * len(lengths) if counts is None else counts * (len(lengths) // len(counts))
    qkv = normal(tokens, heads, 3, head_dim, dtype=dtype)
    gradient = normal(tokens, heads, head_dim, dtype=dtype, seed=1)
    live = torch.zeros(tokens + spare, heads, dtype=torch.bool)
    start = 0
    for length, count in zip(lengths, used, strict=True):
        live[start : start + length, :count] = True
        start += length
    live = live.to(DEVICE)

    def poisoned(rows: Tensor) -> Tensor:
        padded = torch.cat([rows, rows.new_zeros(spare, *rows.shape[1:])])
        padded[~live] = torch.nan
        return padded

    num_heads = heads if counts is None else torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    options = {"num_heads": num_heads, "dropout": dropout_of(dropout_p)}
    offsets = offsets_of(lengths, DEVICE)
    longest = max(lengths, default=0)
    forward = attention_core(
        poisoned(qkv), offsets, longest, keep_log_sum=True, config=config, **options
    )
    context, log_sum = forward
    d_qkv = attention_core_gradient(
        poisoned(gradient),
        poisoned(qkv),
        context,
        log_sum,
        offsets,
        longest,
        config=backward,
        **options,
    )

    def plain(qkv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.clone().requires_grad_()
        context, log_sum = plain_core(qkv, lengths, used, dropout_p)
        (d_qkv,) = torch.autograd.grad(context, qkv, gradient)
        return context.detach(), log_sum.detach(), d_qkv

    inside = live[:tokens]
    # Scores are recomputed, summed in another order: their errors do not cancel against the
    # forward pass's normaliser, as those of PyTorch's saved probabilities do.
    factor = 8.0 if dtype == torch.float32 else 2.0
    contexts, log_sums, gradients = zip(
        plain(qkv, gradient), plain(qkv.double(), gradient.double()), strict=True
    )
    assert_as_accurate("context", context[live], *(c[inside] for c in contexts))
    assert_as_accurate("log_sum", log_sum.t()[live], *(s.t()[inside] for s in log_sums))
    for part, name in enumerate(("d_q", "d_k", "d_v")):
        expected = (g[inside][:, part] for g in gradients)
        assert_as_accurate(name, d_qkv[live][:, part], *expected, factor=factor)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lengths, id="_".join(map(str, lengths)), marks=marks)
        for lengths, marks in (
            ([7, 0, 16], ()),
            ([129, 5], ()),
            ([1, 5], pytest.mark.slow),
            ([63, 64, 65], pytest.mark.slow),
            ([128, 1, 127], pytest.mark.slow),
            ([0, 200, 33], pytest.mark.slow),
        )
    ],
)
@pytest.mark.parametrize("head_dim", availability.HEAD_DIMS, ids="d{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables(dtype, head_dim, lengths):
    check(dtype, lengths, head_dim=head_dim, heads=2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids="p{}".format)
@pytest.mark.parametrize("counts", [None, [2], [1, 3, 0, 2]], ids=["host", "one", "each"])
@pytest.mark.parametrize(
    "config", [SINGLE, GROUPED, STREAMED], ids=["single", "grouped", "streamed"]
)
def test_device_side_heads_and_dropout(config, counts, dropout_p):
    lengths = [16, 3, 5, 9] if config is not STREAMED else [37, 1, 16, 33]
    check(
        torch.float32,
        lengths,
        counts=counts,
        dropout_p=dropout_p,
        config=config,
        backward=config,
        spare=4,
    )


def test_dropout_in_half_precision():
    check(torch.float16, [40, 7], dropout_p=0.1)


def test_everything_dropped():
    qkv, offsets = normal(5, 2, 3, 32), offsets_of([5], DEVICE)
    options = {"num_heads": 2, "dropout": dropout_of(1.0)}
    context, log_sum = attention_core(qkv, offsets, 5, keep_log_sum=True, **options)
    gradient = torch.ones_like(context)
    d_qkv = attention_core_gradient(gradient, qkv, context, log_sum, offsets, 5, **options)
    assert not context.any() and not d_qkv.any()


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths):
    qkv, offsets = normal(0, 2, 3, 32), offsets_of(lengths, DEVICE)
    context, log_sum = attention_core(qkv, offsets, 0, num_heads=2, keep_log_sum=True)
    d_qkv = attention_core_gradient(context, qkv, context, log_sum, offsets, 0, num_heads=2)
    assert (context.shape, log_sum.shape, d_qkv.shape) == ((0, 2, 32), (2, 0), (0, 2, 3, 32))


def test_counts_past_the_buffers_are_its_heads():
    qkv = normal(5, 2, 3, 32)
    offsets = offsets_of([5], DEVICE)
    plain = attention_core(qkv, offsets, 5, num_heads=2)
    many = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    assert torch.equal(attention_core(qkv, offsets, 5, num_heads=many), plain)


def test_no_score_overflows():
    qkv = normal(150, 1, 3, 32) * 40
    offsets = offsets_of([20, 130], DEVICE)
    context, log_sum = attention_core(qkv, offsets, 130, num_heads=1, keep_log_sum=True)
    gradient = attention_core_gradient(
        torch.ones_like(context), qkv, context, log_sum, offsets, 130, num_heads=1
    )
    assert context.isfinite().all() and log_sum.isfinite().all() and gradient.isfinite().all()


def test_same_input_same_bits():
    qkv, gradient = normal(45, 2, 3, 32), normal(45, 2, 32, seed=1)
    offsets = offsets_of([40, 5], DEVICE)
    options = {"num_heads": 2, "dropout": dropout_of(0.2)}

    def run() -> tuple[Tensor, ...]:
        context, log_sum = attention_core(qkv, offsets, 40, keep_log_sum=True, **options)
        d_qkv = attention_core_gradient(gradient, qkv, context, log_sum, offsets, 40, **options)
        return context, log_sum, d_qkv

    first = run()
    for _ in range(2 if DEVICE == "cpu" else 20):
        assert all(map(torch.equal, run(), first))
