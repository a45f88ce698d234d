"""Softmax attention over ragged sequences, straight from the packed QKV projection.

Letters: T tokens, H heads in the buffers, D head size, B sequences. Padding does not exist here:
sequence b is the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Keys and values past its end
are replaced by zeros before any product, so that not even a NaN among them can reach a result.

Width modes: 0, H heads; 1, ``heads_ptr[0]`` heads, the others' outputs left alone; 2,
``heads_ptr[b]`` heads, the others' outputs zero (see `gemm`).
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    base, rows, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows of one head, [rows, BLOCK_D], zeros past `end` and past D."""
    dims = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if MASKED:
        tile = tl.load(at, mask=(rows < end)[:, None] & (dims < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(dims < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store_rows(base, rows, end, stride, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    live = (rows < end)[:, None] & (dims < D)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=live)


@triton.jit
def _key_block(
    q,
    acc,
    highest,
    total,
    k_base,
    v_base,
    begin,
    length,
    stride_qkv,
    scale_log2e,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the streaming softmax."""
    keys = begin + tl.arange(0, BLOCK_KEYS)
    k = _load_rows(k_base, keys, length, stride_qkv, D, BLOCK_D, MASKED)
    scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION) * scale_log2e
    if MASKED:
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, axis=1)
    v = _load_rows(v_base, keys, length, stride_qkv, D, BLOCK_D, MASKED)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    return acc, new_highest, total


@triton.jit
def attention_forward_kernel(
    qkv_ptr,  # [T, H, 3, D], tokens stride_qkv apart
    out_ptr,  # [T, H, D], tokens stride_out apart
    cu_seqlens_ptr,  # int32 [B + 1]
    heads_ptr,  # int32 [1] or [B]
    scale_log2e,  # log2(e) / sqrt(D)
    num_heads,  # H
    num_query_blocks,
    stride_qkv,
    stride_out,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SINGLE_TILE: tl.constexpr,  # every sequence fits BLOCK_KEYS: no streaming
    WIDTH_MODE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes `BLOCK_QUERIES` queries of one head of one sequence.

    Grid: (B * num_query_blocks * H,), heads fastest: programs in flight share whole rows of the
    projection.
    """
    program = tl.program_id(0)
    head = program % num_heads
    block = program // num_heads
    sequence = block // num_query_blocks
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_query = (block % num_query_blocks) * BLOCK_QUERIES
    if first_query >= length:
        return
    start = start.to(tl.int64)
    q_base = qkv_ptr + start * stride_qkv + head * (3 * D)
    k_base = q_base + D
    v_base = q_base + 2 * D
    out_base = out_ptr + start * stride_out + head * D
    queries = first_query + tl.arange(0, BLOCK_QUERIES)
    heads_used = num_heads
    if WIDTH_MODE == 1:
        heads_used = tl.load(heads_ptr)
    elif WIDTH_MODE == 2:
        heads_used = tl.load(heads_ptr + sequence)
    if head >= heads_used:
        if WIDTH_MODE == 2:
            zeros = tl.zeros((BLOCK_QUERIES, BLOCK_D), dtype=tl.float32)
            _store_rows(out_base, queries, length, stride_out, zeros, D, BLOCK_D)
        return

    q = _load_rows(q_base, queries, length, stride_qkv, D, BLOCK_D, True)
    if SINGLE_TILE:
        keys = tl.arange(0, BLOCK_KEYS)
        k = _load_rows(k_base, keys, length, stride_qkv, D, BLOCK_D, True)
        v = _load_rows(v_base, keys, length, stride_qkv, D, BLOCK_D, True)
        scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION) * scale_log2e
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        total = tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, input_precision=INPUT_PRECISION)
    else:
        acc = tl.zeros((BLOCK_QUERIES, BLOCK_D), dtype=tl.float32)
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        whole = length // BLOCK_KEYS * BLOCK_KEYS
        for begin in range(0, whole, BLOCK_KEYS):
            acc, highest, total = _key_block(
                q,
                acc,
                highest,
                total,
                k_base,
                v_base,
                begin,
                length,
                stride_qkv,
                scale_log2e,
                D,
                BLOCK_D,
                BLOCK_KEYS,
                False,
                INPUT_PRECISION,
            )
        if whole < length:
            acc, highest, total = _key_block(
                q,
                acc,
                highest,
                total,
                k_base,
                v_base,
                whole,
                length,
                stride_qkv,
                scale_log2e,
                D,
                BLOCK_D,
                BLOCK_KEYS,
                True,
                INPUT_PRECISION,
            )
    _store_rows(out_base, queries, length, stride_out, acc / total[:, None], D, BLOCK_D)
