"""Row tiles are made once for the layers of a call, and never kept beyond it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)

from dynabert_kernels import _env
from dynabert_kernels.triton.shared_tiles import shared_tiles, tiles_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not _env.triton_interpret(), reason="TRITON_INTERPRET is not set"
)


def on_device(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_a_call_makes_each_table_once():
    offsets, heads, neurons = on_device(0, 3, 9), on_device(2, 1), on_device(5)
    with shared_tiles():
        first = tiles_of(offsets, heads, 9, 4)
        assert tiles_of(offsets, heads, 9, 4) is first
        others = [tiles_of(offsets, neurons, 9, 8), tiles_of(offsets, heads, 9, 3)]
        with shared_tiles():
            assert tiles_of(offsets, heads, 9, 4) is not first
        assert tiles_of(offsets, heads, 9, 4) is first
    assert all(other is not first for other in others)
    assert first.table[:2].tolist() == [[0, 3, 2], [3, 9, 1]]
    assert others[0].table[0].tolist() == [0, 9, 5]


def test_widths_written_to_between_calls_are_read_again():
    offsets, widths = on_device(0, 6), on_device(4)
    tables = []
    for width in (4, 2):
        widths.fill_(width)
        with shared_tiles():
            tables.append(tiles_of(offsets, widths, 6, 4).table)
    widths.fill_(1)
    tables.append(tiles_of(offsets, widths, 6, 4).table)
    assert [int(table[0, 2]) for table in tables] == [4, 2, 1]
