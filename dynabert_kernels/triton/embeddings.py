"""Embeddings of the real tokens of a padded batch, summed and normalised in one kernel.

Letters: B sequences, S padded length, T rows of the packed batch, C hidden_size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynabert_kernels.triton.dispatch import next_power_of_2, start


@triton.jit(
    do_not_specialize=["seq_len", "first_position", "num_words", "num_positions", "num_segments"]
)
def embeddings_kernel(
    input_ids_ptr,  # [B, S], int64
    position_ids_ptr,  # [B, S], int64, if HAS_POSITIONS
    segment_ids_ptr,  # [B, S], int64, if HAS_SEGMENTS
    indices_ptr,  # [T], int64, if HAS_INDICES
    num_tokens_ptr,  # [1], int32, if HAS_SPARE_ROWS
    word_ptr,  # [num_words, C]
    position_ptr,  # [num_positions, C]
    segment_ptr,  # [num_segments, C]
    norm_weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    out_ptr,  # [T, C]
    seq_len,
    first_position,
    num_words,
    num_positions,
    num_segments,
    channels,
    eps,
    HAS_POSITIONS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    HAS_SPARE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program embeds one token; an id out of range makes it NaN. Grid: (T,)."""
    row = tl.program_id(0).to(tl.int64)
    real = row >= 0
    if HAS_SPARE_ROWS:
        real = row < tl.load(num_tokens_ptr)
    at = row
    if HAS_INDICES:
        at = tl.load(indices_ptr + row, mask=real, other=0)
    word = tl.load(input_ids_ptr + at, mask=real, other=0)
    position = first_position + at % seq_len
    if HAS_POSITIONS:
        position = tl.load(position_ids_ptr + at, mask=real, other=0)
    segment = tl.zeros((), dtype=tl.int64)
    if HAS_SEGMENTS:
        segment = tl.load(segment_ids_ptr + at, mask=real, other=0)
    known = (word >= 0) & (word < num_words) & (position >= 0) & (position < num_positions)
    known = known & (segment >= 0) & (segment < num_segments)
    columns = tl.arange(0, COLUMNS)
    inside = columns < channels
    mask = inside & known & real
    total = tl.load(word_ptr + word * channels + columns, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(segment_ptr + segment * channels + columns, mask=mask, other=0.0).to(
        tl.float32
    )
    total += tl.load(position_ptr + position * channels + columns, mask=mask, other=0.0).to(
        tl.float32
    )
    mean = tl.sum(total, 0) / channels
    centred = tl.where(inside, total - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
    weight = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = tl.where(known, centred * inverse * weight + bias, float("nan"))
    tl.store(
        out_ptr + row * channels + columns, normed.to(out_ptr.dtype.element_ty), mask=inside & real
    )


def embeddings(
    input_ids: Tensor,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    indices: Tensor | None,
    num_tokens: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    first_position: int,
    norm_eps: float,
) -> Tensor:
    """``LayerNorm(word + segment + position)``, ``[T, C]``; sums and norm in float32.

    An id out of range gives a row of NaN: a kernel cannot name it, and reads nothing outside.

    Args:
        input_ids: Token ids, ``[B, S]`` int64, contiguous, as all ids.
        position_ids: ``[B, S]``; None for the column plus `first_position`.
        segment_ids: ``[B, S]``; None for 0.
        indices: Padded position of each row, ``[T]`` int64; None for all in order.
        num_tokens: int32 ``[1]`` on the device: rows from there on are left undefined.
        tables: Word, position and segment embeddings, norm weight and bias; contiguous, one dtype.
        first_position: Position of the first column where `position_ids` is None.
        norm_eps: LayerNorm epsilon.
    """
    word, position, segment, norm_weight, norm_bias = tables
    rows = input_ids.numel() if indices is None else indices.shape[0]
    channels = word.shape[1]
    out = torch.empty(rows, channels, dtype=word.dtype, device=word.device)
    if rows > 0:
        start(
            embeddings_kernel,
            (rows,),
            input_ids,
            input_ids if position_ids is None else position_ids,
            input_ids if segment_ids is None else segment_ids,
            input_ids if indices is None else indices,
            input_ids if num_tokens is None else num_tokens,
            word,
            position,
            segment,
            norm_weight,
            norm_bias,
            out,
            input_ids.shape[1],
            first_position,
            word.shape[0],
            position.shape[0],
            segment.shape[0],
            channels,
            norm_eps,
            HAS_POSITIONS=position_ids is not None,
            HAS_SEGMENTS=segment_ids is not None,
            HAS_INDICES=indices is not None,
            HAS_SPARE_ROWS=num_tokens is not None,
            COLUMNS=next_power_of_2(channels),
        )
    return out
