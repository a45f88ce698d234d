"""What the layers of one call share, above all row tiles. Imports no Triton before tiles are made.

Every sublayer of a batch whose widths the device knows asks for the same few tables. Within
`shared_tiles` each is made once: a launch less for every sublayer but the first two, which is felt
where a captured graph runs a single sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from dynabert_kernels.triton.row_tiles import RowTiles


T = TypeVar("T")


class _Scope(threading.local):
    made: dict[tuple[object, ...], Any] | None = None


_scope = _Scope()


@contextmanager
def shared_tiles() -> Iterator[None]:
    """In this block and thread, widths and offsets in the same memory have the same values."""
    before, _scope.made = _scope.made, {}
    try:
        yield
    finally:
        _scope.made = before


def shared(key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What `make` returns, made once for each key within `shared_tiles`, at every call outside."""
    made = _scope.made
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    found: T = made[key]
    return found


def tiles_of(cu_seqlens: Tensor, widths: Tensor, total_tokens: int, limit: int) -> RowTiles:
    """`row_tiles` of a batch, or those that an earlier layer of the same call made."""
    from dynabert_kernels.triton.row_tiles import row_tiles

    key = (
        cu_seqlens.data_ptr(),
        cu_seqlens.numel(),
        widths.data_ptr(),
        widths.numel(),
        total_tokens,
        limit,
    )
    # The tensors are kept beside it, so that no other takes their address.
    return shared(
        key, lambda: (row_tiles(cu_seqlens, widths, total_tokens, limit), cu_seqlens, widths)
    )[0]
