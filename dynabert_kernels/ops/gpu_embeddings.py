"""Embeddings of a padded batch in one Triton kernel, where a GPU backend runs; see `embeddings`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dynabert_kernels import proof
from dynabert_kernels.ops import _trust
from dynabert_kernels.ops._op import forced_backend
from dynabert_kernels.ops.embeddings import EmbeddingTables
from dynabert_kernels.triton import availability
from dynabert_kernels.varlen import Packing

_OP = "embeddings"
_said: set[str] = set()


def gpu_embeddings(
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

    None means that gradients may be needed, that another backend is forced, that tensors differ in
    dtype or device, or that the kernel differs from PyTorch on this card, which one warning says.
    Rows past the last token are undefined.

    Args:
        input_ids: Token ids, ``[B, S]``; an id out of range gives NaN for its token, as all ids.
        position_ids: ``[B or 1, S]``; None for column plus `first_position`.
        token_type_ids: ``[B or 1, S]``; None for 0.
        packing: Where the real tokens are.
        tables: What to look up.
        first_position: Position of the first column where `position_ids` is None.
        norm_eps: LayerNorm epsilon.

    Returns:
        ``[total_tokens, hidden_size]``, dtype of `tables`.

    Raises:
        NotImplementedError: The backend is forced, and its results are in doubt.
    """
    word, device = tables.word, tables.word.device
    if not _runs() or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return None
    if any(table.dtype != word.dtype or not table.is_contiguous() for table in tables):
        return None
    if word.dtype not in availability.DTYPES:
        return None
    of_tokens = [input_ids, position_ids, token_type_ids]
    if any(ids is not None and ids.device != device for ids in of_tokens):
        return None
    if not _is_trusted(word):
        return None
    from dynabert_kernels.triton import embeddings

    shape = input_ids.shape
    words, positions, segments = (
        None if ids is None else ids.expand(shape).long().contiguous() for ids in of_tokens
    )
    assert words is not None
    with torch.cuda.device_of(word):
        return embeddings.embeddings(
            words,
            positions,
            segments,
            packing.indices,
            None if packing.slots is None else packing.cu_seqlens[-1:],
            tables,
            first_position=first_position,
            norm_eps=norm_eps,
        )


def _runs() -> bool:
    forced = forced_backend()
    if availability.triton_missing() is not None:
        return False
    return forced in proof.BACKENDS or (forced is None and availability.OPT_IN is None)


def _is_trusted(word: Tensor) -> bool:
    use = (proof.TRITON, _OP, proof.name_of(word.dtype), None, False, word.get_device())
    reason = None if use in _trust.trusted else _trust.doubt(use, word.device, _difference)
    if reason is None:
        return True
    if forced_backend() in proof.BACKENDS:
        raise NotImplementedError(f"{_OP}: the forced backend cannot run this call: {reason}")
    if reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"{_OP}: running on plain PyTorch, because triton: {reason}. Said once.",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def _difference(path: proof.Path, device: torch.device) -> str | None:
    from dynabert_kernels.ops import _self_check

    return _self_check.embeddings_difference(path, device)
