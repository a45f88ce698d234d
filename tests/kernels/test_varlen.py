from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynabert_kernels.varlen import (
    Packing,
    offsets_of,
    position_in_sequence,
    sequence_of_token,
    token_positions,
    unpad,
    unpad_on_device,
)

MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
    "empty_row": [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    "all_empty": [[0, 0, 0, 0]] * 3,
    "full": [[1, 1, 1, 1]] * 3,
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_unpad_keeps_the_real_tokens_in_order(rows, dtype):
    mask = torch.tensor(rows).to(dtype)
    values = torch.arange(12.0).view(3, 4)
    packing = unpad(mask)
    expected = [values[b, s].item() for b in range(3) for s in range(4) if rows[b][s]]
    assert packing.pack(values).tolist() == expected
    lengths = [sum(row) for row in rows]
    assert packing.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.lengths.tolist() == lengths
    assert packing.max_seqlen == max(lengths)
    assert packing.total_tokens == len(expected)
    assert packing.sequence_of_token().tolist() == [b for b in range(3) for _ in range(lengths[b])]


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_restore_puts_zeros_at_padding(rows):
    mask = torch.tensor(rows)
    values = torch.randn(3, 4, 2)
    packing = unpad(mask)
    restored = packing.restore(packing.pack(values))
    assert torch.equal(restored, torch.where(mask[..., None].bool(), values, 0))


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("count", [1, 2, 3])
def test_repeat_is_the_packing_of_the_repeated_batch(rows, count):
    mask = torch.tensor(rows)
    repeated, expected = unpad(mask).repeat(count), unpad(mask.repeat(count, 1))
    values = torch.arange(12.0 * count).view(3 * count, 4)
    assert torch.equal(repeated.pack(values), expected.pack(values))
    assert torch.equal(repeated.cu_seqlens, expected.cu_seqlens)
    assert repeated.cu_seqlens.dtype == torch.int32
    for name in ("max_seqlen", "batch_size", "seq_len", "total_tokens"):
        assert getattr(repeated, name) == getattr(expected, name)


def test_pack_drops_nan_at_padding():
    mask = torch.tensor(MASKS["holes"])
    values = torch.full((3, 4), torch.nan).masked_fill(mask.bool(), 1.0)
    packing = unpad(mask)
    assert packing.restore(packing.pack(values)).isfinite().all()


def test_pack_and_restore_are_differentiable():
    packing = unpad(torch.tensor(MASKS["left"]))
    values = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.restore(packing.pack(x) ** 2), (values,))


def test_full_mask_needs_no_gather():
    packing = unpad(torch.ones(3, 4))
    values = torch.randn(3, 4, 5)
    assert packing.indices is None
    assert packing.pack(values).data_ptr() == values.data_ptr()
    assert packing.restore(packing.pack(values)).data_ptr() == values.data_ptr()


def test_dense_equals_a_full_mask():
    dense, masked = Packing.dense(3, 4), unpad(torch.ones(3, 4))
    assert torch.equal(dense.cu_seqlens, masked.cu_seqlens)
    assert dense.cu_seqlens.dtype == torch.int32
    fields = ("indices", "max_seqlen", "batch_size", "seq_len", "total_tokens")
    assert all(getattr(dense, name) == getattr(masked, name) for name in fields)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_batches_are_defined(shape):
    packing = unpad(torch.ones(shape))
    assert packing.total_tokens == 0
    assert packing.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert packing.restore(packing.pack(torch.ones(*shape, 5))).shape == (*shape, 5)
    assert Packing.dense(*shape).pack(torch.ones(*shape, 5)).shape == (0, 5)


@pytest.mark.parametrize("rows", [[0, 2], [2, 0], [1], [0, 1, 2], [], [1, 1]], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_select_is_the_packing_of_the_chosen_rows(mask, rows):
    whole = unpad(torch.tensor(mask))
    values = torch.randn(3, 4)
    part, tokens = whole.select(rows)
    packed = whole.pack(values)[tokens]
    alone = unpad(torch.tensor(mask)[rows].view(len(rows), 4))
    assert torch.equal(part.cu_seqlens, alone.cu_seqlens)
    assert (part.max_seqlen, part.batch_size) == (alone.max_seqlen if rows else 0, len(rows))
    assert torch.equal(packed, alone.pack(values[rows]))
    assert torch.equal(part.restore(packed), alone.restore(packed))


def test_select_of_neighbours_is_a_slice():
    _, tokens = unpad(torch.tensor(MASKS["right"])).select([1, 2])
    assert tokens == slice(3, 8)


def test_select_again_from_a_selection():
    whole = unpad(torch.tensor(MASKS["holes"]))
    values = torch.randn(3, 4)
    part, tokens = whole.select([2, 0])
    twice, inner = part.select([1])
    once, direct = whole.select([0])
    packed = whole.pack(values)
    assert torch.equal(packed[tokens][inner], packed[direct])
    assert torch.equal(twice.restore(packed[direct]), once.restore(packed[direct]))


@pytest.mark.parametrize("row", [-1, 3])
def test_select_refuses_a_row_out_of_range(row):
    with pytest.raises(ValueError, match=rf"Packing.select: row={row}, expected 0 to 2"):
        Packing.dense(3, 4).select([row])


def test_token_positions_join_neighbours_and_skip_empty_spans():
    assert token_positions([(3, 5), (5, 5), (5, 9)]) == slice(3, 9)
    assert token_positions([(7, 7), (0, 2)]) == slice(0, 2)
    assert token_positions([]) == slice(0, 0)
    assert token_positions([(4, 6), (9, 9), (0, 2)]).tolist() == [4, 5, 0, 1]


def test_tokens_know_sequence_and_position():
    offsets = offsets_of([0, 3, 0, 2, 0])
    assert sequence_of_token(offsets, 5).tolist() == [1, 1, 1, 3, 3]
    assert position_in_sequence(offsets, 5).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("mask", "error"),
    [([[1, 1]], TypeError), (torch.ones(3), ValueError), (torch.ones(1, 1, 3, 3), ValueError)],
    ids=["list", "1d", "4d"],
)
def test_unpad_names_what_is_wrong(mask, error):
    with pytest.raises(error, match=r"^unpad: attention_mask.*expected"):
        unpad(mask)


def test_pack_and_restore_name_what_is_wrong():
    packing = unpad(torch.tensor(MASKS["right"]))
    with pytest.raises(ValueError, match=r"pack: padded.shape=\[4, 3\], expected \[3, 4, ...\]"):
        packing.pack(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"restore: packed.shape=\[12\], expected \[8, ...\]"):
        packing.restore(torch.ones(12))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    mask=st.integers(1, 5).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=5
        )
    )
)
def test_restore_undoes_pack_for_any_mask(mask):
    real = torch.tensor(mask)
    values = torch.randn(*real.shape, 3)
    packing = unpad(real)
    assert torch.equal(packing.restore(packing.pack(values)), values * real[..., None])
    assert packing.max_seqlen == int(real.sum(1).max())


@pytest.mark.parametrize("order", [None, [2, 0, 1], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_unpad_on_device_packs_the_same_tokens_to_the_front(rows, order):
    mask = torch.tensor(rows)
    values = torch.randn(3, 4, 2, requires_grad=True)
    packing = unpad_on_device(mask, None if order is None else torch.tensor(order))
    expected = unpad(mask) if order is None else unpad(mask).reordered(order)
    total = expected.total_tokens
    assert packing.total_tokens == 12
    assert torch.equal(packing.cu_seqlens, expected.cu_seqlens)
    assert packing.cu_seqlens.dtype == torch.int32
    packed = packing.pack(values)
    assert torch.equal(packed[:total], expected.pack(values))
    spare = torch.cat([packed[:total], packed[total:] * torch.nan])
    restored = packing.restore(spare)
    assert torch.equal(restored, torch.where(mask[..., None].bool(), values, 0))
    trimmed = packing.without_spare_rows()
    assert torch.equal(trimmed.restore(packed[:total]), restored)
    (gradient,) = torch.autograd.grad(packing.restore(packed).sum(), values)
    assert torch.equal(gradient, mask[..., None].expand(3, 4, 2).float())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_reordered_sequences_come_from_and_go_to_the_same_positions(rows, order):
    mask = torch.tensor(rows)
    values = torch.randn(3, 4, 2)
    packing = unpad(mask)
    reordered = packing.reordered(order)
    moved = unpad(mask[order])
    assert torch.equal(reordered.cu_seqlens, moved.cu_seqlens)
    assert list(reordered.host_offsets()) == moved.cu_seqlens.tolist()
    packed = reordered.pack(values)
    assert torch.equal(packed, moved.pack(values[order]))
    assert torch.equal(reordered.restore(packed), packing.restore(packing.pack(values)))


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_host_offsets_are_those_of_the_device(rows):
    packing = unpad(torch.tensor(rows))
    assert list(packing.host_offsets()) == packing.cu_seqlens.tolist()
    dense = Packing.dense(3, 4)
    assert list(dense.host_offsets()) == dense.cu_seqlens.tolist()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_a_mask_on_the_cpu_packs_tokens_on_the_gpu_without_a_wait(rows):
    values, device = torch.randn(3, 4).cuda(), torch.device("cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packing = unpad(torch.tensor(rows), device)
        packed = packing.pack(values)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = unpad(torch.tensor(rows).cuda())
    assert torch.equal(packed, expected.pack(values))
    assert torch.equal(packing.cu_seqlens, expected.cu_seqlens)
    assert list(packing.host_offsets()) == expected.cu_seqlens.tolist()
    assert (packing.max_seqlen, packing.total_tokens) == (
        expected.max_seqlen,
        expected.total_tokens,
    )
