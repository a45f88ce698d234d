"""Softmax attention over ragged sequences, straight from the packed QKV projection.

Letters: T tokens, H heads, D head size, B sequences. Padding does not exist here: sequence b is
the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. Keys and values past its end are replaced by
zeros before any product, so that not even a NaN among them can reach a result.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(base, rows, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [rows, BLOCK_D], zeros past `end` and past D."""
    dims = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def attention_forward_kernel(
    qkv_ptr,  # [T, H, 3, D], contiguous
    out_ptr,  # [T, H, D], contiguous
    cu_seqlens_ptr,  # int32 [B + 1]
    scale_log2e,  # log2(e) / sqrt(D)
    num_heads,  # H
    num_query_blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SINGLE_TILE: tl.constexpr,  # every sequence fits BLOCK_KEYS: no streaming
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
    stride = num_heads * 3 * D
    q_base = qkv_ptr + start.to(tl.int64) * stride + head * (3 * D)
    k_base = q_base + D
    v_base = q_base + 2 * D
    queries = first_query + tl.arange(0, BLOCK_QUERIES)
    q = _load_rows(q_base, queries, length, stride, D, BLOCK_D)
    if SINGLE_TILE:
        keys = tl.arange(0, BLOCK_KEYS)
        k = _load_rows(k_base, keys, length, stride, D, BLOCK_D)
        v = _load_rows(v_base, keys, length, stride, D, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION) * scale_log2e
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        total = tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, input_precision=INPUT_PRECISION)
    else:
        acc = tl.zeros((BLOCK_QUERIES, BLOCK_D), dtype=tl.float32)
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        for begin in range(0, length, BLOCK_KEYS):
            keys = begin + tl.arange(0, BLOCK_KEYS)
            k = _load_rows(k_base, keys, length, stride, D, BLOCK_D)
            scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION) * scale_log2e
            # Each block holds a real key, so the highest score is never -inf - -inf.
            scores = tl.where((keys < length)[None, :], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, axis=1)
            v = _load_rows(v_base, keys, length, stride, D, BLOCK_D)
            acc = tl.dot(
                weights.to(v.dtype), v, acc * shrink[:, None], input_precision=INPUT_PRECISION
            )
            highest = new_highest
    context = acc / total[:, None]
    dims = tl.arange(0, BLOCK_D)
    out_base = out_ptr + start.to(tl.int64) * (num_heads * D) + head * D
    out_at = out_base + queries.to(tl.int64)[:, None] * (num_heads * D) + dims[None, :]
    live = (queries < length)[:, None] & (dims < D)[None, :]
    tl.store(out_at, context.to(out_ptr.dtype.element_ty), mask=live)
