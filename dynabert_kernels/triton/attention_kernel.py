"""Softmax attention over ragged sequences, straight from the packed QKV projection.

Letters: T tokens, H heads, D head size, B sequences. Padding does not exist here: sequence b is
the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``. What lies past its end, or in heads beyond
its own, is never loaded, so that not even a NaN there can reach a result.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.dropout import keeps_attention

# What differs from call to call and must compile nothing anew.
VARYING = (
    "cu_seqlens_ptr",
    "head_counts_ptr",
    "seed_ptr",
    "total_tokens",
    "num_heads",
    "counts_stride",
    "num_blocks",
    "heads_per_program",
)


@triton.jit
def load_rows(
    base,
    count,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The first `count` rows of one head, [ROWS, BLOCK_D], zeros past them and past D.

    WHOLE: there are ROWS of them.
    """
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    at = base + (rows[:, None] * stride + dims[None, :])
    if WHOLE and BLOCK_D == D:
        tile = tl.load(at)
    else:
        inside = (rows < count)[:, None]
        if BLOCK_D > D:
            inside = inside & (dims < D)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(
    base, tile, count, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store the first `count` rows of one head, of a [ROWS, BLOCK_D] tile."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None]
    if BLOCK_D > D:
        inside = inside & (dims < D)[None, :]
    at = base + (rows[:, None] * stride + dims[None, :])
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def heads_of(head_counts_ptr, counts_stride, sequence, num_heads):
    """How many heads a sequence has, at most `num_heads`."""
    heads = num_heads
    if head_counts_ptr is not None:
        heads = tl.minimum(tl.load(head_counts_ptr + sequence * counts_stride), num_heads)
    return heads


@triton.jit
def _drop(weights, seed, dropout_p, query, key, head, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Zeros where the dropout drops, of queries from `query` (in the batch) and keys from `key`."""
    queries = query + tl.arange(0, ROWS)[:, None]
    keys = key + tl.arange(0, KEYS)[None, :]
    return tl.where(keeps_attention(seed, queries, keys, head, dropout_p), weights, 0.0)


@triton.jit
def _attend_block(
    q,
    acc,
    highest,
    total,
    k_base,
    stride,
    count,
    scale_log2e,
    seed,
    dropout_p,
    query,
    key,
    head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the streaming softmax: `count` keys, KEYS of them where WHOLE."""
    k = load_rows(k_base, count, stride, KEYS, D, BLOCK_D, WHOLE)
    v = load_rows(k_base + D, count, stride, KEYS, D, BLOCK_D, WHOLE)
    scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION)
    if not WHOLE:
        # A block holds a real key, so the highest score is never -inf - -inf.
        scores = tl.where((tl.arange(0, KEYS) < count)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2e)
    weights = tl.exp2(scores * scale_log2e - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, axis=1)
    if DROPOUT:
        weights = _drop(weights, seed, dropout_p, query, key, head, ROWS, KEYS)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=INPUT_PRECISION)
    return acc, new_highest, total


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    qkv_ptr,  # [T, H, 3, D], contiguous
    out_ptr,  # [T, H, D], contiguous
    log_sum_ptr,  # None, or float32 [H, T]: log2 of the sum of exp(score)
    cu_seqlens_ptr,  # int32 [B + 1]
    head_counts_ptr,  # None: H heads each; or int32 [1] or [B]
    seed_ptr,  # None: no dropout; or int64 [1]
    dropout_p,
    keep_scale,  # 1 / (1 - dropout_p)
    scale_log2e,  # log2(e) / sqrt(D)
    total_tokens,  # T
    num_heads,  # H
    counts_stride,  # of head_counts: 0 or 1
    num_blocks,  # of queries in the longest sequence
    heads_per_program,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SINGLE_TILE: tl.constexpr,  # every sequence fits BLOCK_KEYS: no streaming
    NUM_STAGES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes `BLOCK_QUERIES` queries of a few heads of one sequence.

    Grid: (B * num_blocks * cdiv(H, heads_per_program),), heads fastest: programs in flight share
    whole rows of the projection. A single tile loads the next head while it computes one.
    """
    program = tl.program_id(0)
    num_groups = tl.cdiv(num_heads, heads_per_program)
    block = program // num_groups
    sequence = block // num_blocks
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_query = (block % num_blocks) * BLOCK_QUERIES
    first_head = (program % num_groups) * heads_per_program
    end_head = tl.minimum(
        first_head + heads_per_program,
        heads_of(head_counts_ptr, counts_stride, sequence, num_heads),
    )
    if first_query >= length or first_head >= end_head:
        return
    DROPOUT: tl.constexpr = seed_ptr is not None
    # Whole blocks of keys go without masks, unless registers are too few for a second step.
    PEELED: tl.constexpr = qkv_ptr.dtype.element_ty != tl.float32 and seed_ptr is None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    stride = num_heads * 3 * D
    row = stride.to(tl.int64)
    num_queries = length - first_query
    query = start + first_query
    rows = tl.arange(0, BLOCK_QUERIES)
    sequence_base = qkv_ptr + start * row
    query_base = qkv_ptr + query * row
    out_base = out_ptr + query.to(tl.int64) * (num_heads * D)
    for head in tl.range(first_head, end_head, num_stages=NUM_STAGES if SINGLE_TILE else 1):
        k_base = sequence_base + head * (3 * D) + D
        q = load_rows(
            query_base + head * (3 * D), num_queries, stride, BLOCK_QUERIES, D, BLOCK_D, False
        )
        if SINGLE_TILE:
            k = load_rows(k_base, length, stride, BLOCK_KEYS, D, BLOCK_D, False)
            v = load_rows(k_base + D, length, stride, BLOCK_KEYS, D, BLOCK_D, False)
            scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION)
            scores = tl.where((tl.arange(0, BLOCK_KEYS) < length)[None, :], scores, float("-inf"))
            highest = tl.max(scores, axis=1) * scale_log2e
            weights = tl.exp2(scores * scale_log2e - highest[:, None])
            total = tl.sum(weights, axis=1)
            if DROPOUT:
                weights = _drop(weights, seed, dropout_p, query, 0, head, BLOCK_QUERIES, BLOCK_KEYS)
            acc = tl.dot(weights.to(v.dtype), v, input_precision=INPUT_PRECISION)
        else:
            acc = tl.zeros((BLOCK_QUERIES, BLOCK_D), dtype=tl.float32)
            highest = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
            whole = length // BLOCK_KEYS * BLOCK_KEYS if PEELED else length
            for key in tl.range(0, whole, BLOCK_KEYS, num_stages=NUM_STAGES):
                acc, highest, total = _attend_block(
                    q,
                    acc,
                    highest,
                    total,
                    k_base + key * row,
                    stride,
                    length - key,
                    scale_log2e,
                    seed,
                    dropout_p,
                    query,
                    key,
                    head,
                    D,
                    BLOCK_D,
                    BLOCK_QUERIES,
                    BLOCK_KEYS,
                    PEELED,
                    DROPOUT,
                    INPUT_PRECISION,
                )
            if PEELED and whole < length:
                acc, highest, total = _attend_block(
                    q,
                    acc,
                    highest,
                    total,
                    k_base + whole * row,
                    stride,
                    length - whole,
                    scale_log2e,
                    seed,
                    dropout_p,
                    query,
                    whole,
                    head,
                    D,
                    BLOCK_D,
                    BLOCK_QUERIES,
                    BLOCK_KEYS,
                    False,
                    DROPOUT,
                    INPUT_PRECISION,
                )
        if DROPOUT:
            acc *= (keep_scale / total)[:, None]
        else:
            acc *= (1.0 / total)[:, None]
        store_rows(out_base + head * D, acc, num_queries, num_heads * D, BLOCK_QUERIES, D, BLOCK_D)
        if log_sum_ptr is not None:
            log_sum_at = log_sum_ptr + total_tokens.to(tl.int64) * head + query + rows
            tl.store(log_sum_at, highest + tl.log2(total), mask=rows < num_queries)
