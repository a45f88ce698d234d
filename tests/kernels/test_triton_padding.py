"""Padding and embeddings in Triton, in its interpreter or on a card."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels.testing import assert_as_accurate
from dynabert_kernels.triton import padding
from dynabert_kernels.triton.embeddings import embeddings
from dynabert_kernels.varlen import unpad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")

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


def random_mask(batch_size, seq_len, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, seq_len, generator=generator) < share


SHAPES = [(1, 1), (1, 7), (3, 4), (5, 130), (70, 63), (0, 4)]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("has_order", [False, True], ids=["in-order", "reordered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpad_packs_the_same_tokens_as_the_host(shape, has_order, share):
    batch_size, seq_len = shape
    mask = random_mask(batch_size, seq_len, share)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(batch_size, generator=generator) if has_order else None
    expected = unpad(mask) if order is None else unpad(mask).reordered(order.tolist())
    offsets, indices, slots = padding.unpad(
        mask.to(DEVICE), None if order is None else order.to(DEVICE)
    )
    positions = torch.arange(batch_size * seq_len).view(batch_size, seq_len)
    packed = expected.pack(positions)
    assert torch.equal(offsets.cpu(), expected.cu_seqlens)
    assert torch.equal(indices[: len(packed)].cpu(), packed)
    assert torch.equal(indices.sort().values.cpu(), positions.flatten())
    real = mask.flatten()
    assert torch.equal(slots.cpu() >= 0, real)
    assert torch.equal(packed[slots.cpu()[real]], positions.flatten()[real])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 96, 130])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_restore_reads_no_spare_row(channels, share, dtype):
    mask = random_mask(5, 9, share)
    packing = unpad(mask)
    values = torch.randn(packing.total_tokens, channels).to(dtype)
    spare = torch.full((mask.numel() - len(values), channels), torch.nan, dtype=dtype)
    _, _, slots = padding.unpad(mask.to(DEVICE), None)
    restored = padding.restore(torch.cat([values, spare]).to(DEVICE), slots)
    assert torch.equal(restored.cpu().view(5, 9, channels), packing.restore(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["ids", "segments", "positions", "all"])
@pytest.mark.parametrize("form", ["dense", "packed", "spare-rows"])
def test_embeddings_equal_pytorch(form, given, dtype):
    channels, shape = 36, (4, 7)
    generator = torch.Generator().manual_seed(0)
    sizes = (23, 11, 2)
    words, positions, segments = (
        torch.randint(0, size, shape, generator=generator).to(DEVICE) for size in sizes
    )
    tables = [torch.randn(size, channels, generator=generator) for size in sizes]
    tables += [torch.randn(channels, generator=generator) for _ in range(2)]
    tables = tuple(table.to(DEVICE, dtype) for table in tables)
    positions = positions if given in ("positions", "all") else None
    segments = segments if given in ("segments", "all") else None
    mask = random_mask(*shape, 0.6)
    packing = unpad(mask)
    offsets, indices, _ = padding.unpad(mask.to(DEVICE), None)
    real = torch.arange(mask.numel()) if form == "dense" else packing.indices
    if form == "dense":
        indices = None
    elif form == "packed":
        indices = packing.indices.to(DEVICE)

    def plain(dtype):
        word, position, segment, weight, bias = (table.to(dtype) for table in tables)
        at = real.to(DEVICE)
        place = 3 + at % shape[1] if positions is None else positions.flatten()[at]
        part = torch.zeros_like(at) if segments is None else segments.flatten()[at]
        total = word[words.flatten()[at]] + segment[part] + position[place]
        return F.layer_norm(total, (channels,), weight, bias, 1e-12)

    result = embeddings(
        words,
        positions,
        segments,
        indices,
        offsets[-1:] if form == "spare-rows" else None,
        tables,
        first_position=3,
        norm_eps=1e-12,
    )
    assert_as_accurate("embeddings", result[: len(real)], plain(dtype), plain(torch.float64))
    assert result[len(real) :].isnan().all()


@pytest.mark.parametrize("name", ["words", "positions", "segments"])
@pytest.mark.parametrize("bad", [-1, 5])
def test_an_id_out_of_range_is_nan_and_stays_alone(name, bad):
    ids = {key: torch.ones(1, 4, dtype=torch.long) for key in ("words", "positions", "segments")}
    ids[name][0, 2] = bad
    tables = (*(torch.randn(5, 8) for _ in range(3)), torch.ones(8), torch.zeros(8))
    result = embeddings(
        *(value.to(DEVICE) for value in ids.values()),
        None,
        None,
        tuple(table.to(DEVICE) for table in tables),
        first_position=0,
        norm_eps=1e-5,
    )
    assert result.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert result[[0, 1, 3]].isfinite().all()
