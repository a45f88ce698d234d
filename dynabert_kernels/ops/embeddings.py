"""Embeddings of a padded batch in one call, where the C++ kernels can make them.

Like `encoder`, not an op with a reference of its own: it saves the six ops of plain PyTorch between
token ids and the first layer, which for a narrow subnet are a large part of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynabert_kernels import _extension
from dynabert_kernels.ops import _cpu
from dynabert_kernels.varlen import Packing

_LIBRARY = torch.library.Library("dynabert", "FRAGMENT")
_LIBRARY.define(
    "embeddings.cpu(Tensor input_ids, Tensor? position_ids, int first_position, "
    "Tensor? token_type_ids, Tensor? indices, Tensor[] tables, float norm_eps) -> Tensor"
)
_NATIVE = torch.ops.dynabert.embeddings.cpu
_HAS_KERNEL = _extension.has_kernel("dynabert::embeddings.cpu")
_ID_DTYPES = (torch.int64, torch.int32)


class EmbeddingTables(NamedTuple):
    """What the ids of a token look up, and the LayerNorm of the sum.

    Attributes:
        word: ``[V, C]``; the others have its dtype.
        position: ``[P, C]``.
        segment: ``[N, C]``.
        norm_weight: ``[C]``.
        norm_bias: ``[C]``.
    """

    word: Tensor
    position: Tensor
    segment: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def embeddings(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    packing: Packing,
    tables: EmbeddingTables,
    *,
    first_position: int,
    norm_eps: float,
) -> Tensor | None:
    """``LayerNorm(word + position + segment)`` of the real tokens, or None where PyTorch has to.

    None means what it means for `encoder`. Sums and norm are in float32, whatever the dtype.

    Args:
        input_ids: Token ids, ``[B, S]``; int32 or int64, as all ids.
        position_ids: ``[B or 1, S]``; None for column plus `first_position`.
        token_type_ids: ``[B or 1, S]``; None for 0.
        packing: Where the real tokens are.
        tables: What to look up.
        first_position: Position of the first column where `position_ids` is None.
        norm_eps: LayerNorm epsilon.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `tables`.

    Raises:
        ValueError: An id is out of range, that of a padded position included; or a shape is.
    """
    if not (_HAS_KERNEL and _cpu.runs_unforced(tables.word)) or torch.is_autocast_enabled(
        _cpu.DEVICE
    ):
        return None
    dtype = tables.word.dtype
    if dtype not in _cpu.DTYPES or any(table.dtype != dtype for table in tables):
        return None
    for ids in (input_ids, position_ids, token_type_ids):
        if ids is not None and not (ids.is_cpu and ids.dtype in _ID_DTYPES):
            return None
    result: Tensor = _NATIVE(
        input_ids, position_ids, first_position, token_type_ids, packing.indices, tables, norm_eps
    )
    return result
