"""The gradient of attention over ragged sequences; layouts as in `attention_kernel`.

Probabilities are recomputed from the log-sum-exp of the forward pass, and its dropout mask from the
seed. Every element is written once, by one program, in a fixed order.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.attention_kernel import VARYING, heads_of, load_rows, store_rows
from dynabert_kernels.triton.dropout import keeps_attention


@triton.jit(do_not_specialize=VARYING)
def attention_gradient_queries_kernel(
    gradient_ptr,  # [T, H, D], contiguous
    qkv_ptr,  # [T, H, 3, D], contiguous
    context_ptr,  # [T, H, D], contiguous: the forward pass's result
    log_sum_ptr,  # float32 [H, T]: log2 of the sum of exp(score)
    delta_ptr,  # float32 [H, T]: gradient . context of each query, written here
    d_qkv_ptr,  # [T, H, 3, D], contiguous: the queries' third is written here
    cu_seqlens_ptr,  # int32 [B + 1]
    head_counts_ptr,  # None: H heads each; or int32 [1] or [B]
    seed_ptr,  # None: no dropout; or int64 [1]
    dropout_p,
    keep_scale,  # 1 / (1 - dropout_p)
    scale,  # 1 / sqrt(D)
    scale_log2e,  # log2(e) / sqrt(D)
    total_tokens,  # T
    num_heads,  # H
    counts_stride,  # of head_counts: 0 or 1
    num_blocks,  # of queries in the longest sequence
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes the gradient of `BLOCK_QUERIES` queries of one head, key by key.

    Grid: (B * num_blocks * H,), heads fastest.
    """
    program = tl.program_id(0)
    head = program % num_heads
    block = program // num_heads
    sequence = block // num_blocks
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_query = (block % num_blocks) * BLOCK_QUERIES
    if first_query >= length or head >= heads_of(
        head_counts_ptr, counts_stride, sequence, num_heads
    ):
        return
    DROPOUT: tl.constexpr = seed_ptr is not None
    stride = num_heads * 3 * D
    context_stride = num_heads * D
    row = stride.to(tl.int64)
    context_row = context_stride.to(tl.int64)
    num_queries = length - first_query
    query = start + first_query
    rows = tl.arange(0, BLOCK_QUERIES)
    live = rows < num_queries
    q_at = query * row + head * (3 * D)
    context_at = query * context_row + head * D
    q = load_rows(qkv_ptr + q_at, num_queries, stride, BLOCK_QUERIES, D, BLOCK_D, False)
    gradient = load_rows(
        gradient_ptr + context_at, num_queries, context_stride, BLOCK_QUERIES, D, BLOCK_D, False
    )
    context = load_rows(
        context_ptr + context_at, num_queries, context_stride, BLOCK_QUERIES, D, BLOCK_D, False
    )
    delta = tl.sum(gradient.to(tl.float32) * context.to(tl.float32), axis=1)
    vector_at = total_tokens.to(tl.int64) * head + query + rows
    tl.store(delta_ptr + vector_at, delta, mask=live)
    # exp2 of -inf: what is no query has no weight.
    log_sum = tl.load(log_sum_ptr + vector_at, mask=live, other=float("inf"))
    k_base = qkv_ptr + start * row + head * (3 * D) + D
    d_q = tl.zeros((BLOCK_QUERIES, BLOCK_D), dtype=tl.float32)
    for key in range(0, length, BLOCK_KEYS):
        num_keys = length - key
        key_base = k_base + key * row
        k = load_rows(key_base, num_keys, stride, BLOCK_KEYS, D, BLOCK_D, False)
        v = load_rows(key_base + D, num_keys, stride, BLOCK_KEYS, D, BLOCK_D, False)
        keys = tl.arange(0, BLOCK_KEYS)
        scores = tl.dot(q, k.T, input_precision=INPUT_PRECISION)
        # At most 1, and what is no key, all zeros, finite: its share of every product is then 0.
        weights = tl.exp2(tl.minimum(scores * scale_log2e - log_sum[:, None], 0.0))
        d_weights = tl.dot(gradient, v.T, input_precision=INPUT_PRECISION)
        if DROPOUT:
            kept = keeps_attention(
                tl.load(seed_ptr), (query + rows)[:, None], (key + keys)[None, :], head, dropout_p
            )
            d_weights = tl.where(kept, d_weights * keep_scale, 0.0)
        d_scores = (weights * (d_weights - delta[:, None])).to(k.dtype)
        d_q = tl.dot(d_scores, k, d_q, input_precision=INPUT_PRECISION)
    store_rows(d_qkv_ptr + q_at, d_q * scale, num_queries, stride, BLOCK_QUERIES, D, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def attention_gradient_keys_kernel(
    gradient_ptr,  # [T, H, D], contiguous
    qkv_ptr,  # [T, H, 3, D], contiguous
    context_ptr,  # [T, H, D], contiguous; None unless ONE_PASS
    log_sum_ptr,  # float32 [H, T]: log2 of the sum of exp(score)
    delta_ptr,  # float32 [H, T]: gradient . context of each query; None where ONE_PASS
    d_qkv_ptr,  # [T, H, 3, D], contiguous: keys and values are written, queries too if ONE_PASS
    cu_seqlens_ptr,  # int32 [B + 1]
    head_counts_ptr,  # None: H heads each; or int32 [1] or [B]
    seed_ptr,  # None: no dropout; or int64 [1]
    dropout_p,
    keep_scale,  # 1 / (1 - dropout_p)
    scale,  # 1 / sqrt(D)
    scale_log2e,  # log2(e) / sqrt(D)
    total_tokens,  # T
    num_heads,  # H
    counts_stride,  # of head_counts: 0 or 1
    num_blocks,  # of keys in the longest sequence
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    ONE_PASS: tl.constexpr,  # every sequence fits BLOCK_KEYS
    INPUT_PRECISION: tl.constexpr,
):
    """One program computes the gradient of `BLOCK_KEYS` keys and values of one head, query by
    query; where that is the whole sequence, that of its queries too.

    Grid: (B * num_blocks * H,), heads fastest. Scores are [keys, queries] here.
    """
    program = tl.program_id(0)
    head = program % num_heads
    block = program // num_heads
    sequence = block // num_blocks
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_key = (block % num_blocks) * BLOCK_KEYS
    if first_key >= length or head >= heads_of(head_counts_ptr, counts_stride, sequence, num_heads):
        return
    DROPOUT: tl.constexpr = seed_ptr is not None
    stride = num_heads * 3 * D
    context_stride = num_heads * D
    row = stride.to(tl.int64)
    context_row = context_stride.to(tl.int64)
    num_keys = length - first_key
    keys = tl.arange(0, BLOCK_KEYS)
    rows = tl.arange(0, BLOCK_QUERIES)
    k_at = (start + first_key) * row + head * (3 * D) + D
    k = load_rows(qkv_ptr + k_at, num_keys, stride, BLOCK_KEYS, D, BLOCK_D, False)
    v = load_rows(qkv_ptr + k_at + D, num_keys, stride, BLOCK_KEYS, D, BLOCK_D, False)
    d_k = tl.zeros((BLOCK_KEYS, BLOCK_D), dtype=tl.float32)
    d_v = tl.zeros((BLOCK_KEYS, BLOCK_D), dtype=tl.float32)
    for first_query in range(0, length, BLOCK_QUERIES):
        num_queries = length - first_query
        query = start + first_query
        live = rows < num_queries
        q_at = query * row + head * (3 * D)
        context_at = query * context_row + head * D
        vector_at = total_tokens.to(tl.int64) * head + query + rows
        q = load_rows(qkv_ptr + q_at, num_queries, stride, BLOCK_QUERIES, D, BLOCK_D, False)
        gradient = load_rows(
            gradient_ptr + context_at, num_queries, context_stride, BLOCK_QUERIES, D, BLOCK_D, False
        )
        # exp2 of -inf: what is no query has no weight.
        log_sum = tl.load(log_sum_ptr + vector_at, mask=live, other=float("inf"))
        if ONE_PASS:
            context_base = context_ptr + context_at
            context = load_rows(
                context_base, num_queries, context_stride, BLOCK_QUERIES, D, BLOCK_D, False
            )
            delta = tl.sum(gradient.to(tl.float32) * context.to(tl.float32), axis=1)
        scores = tl.dot(k, q.T, input_precision=INPUT_PRECISION)
        # At most 1, and what is no key, all zeros, finite: its share of every product is then 0.
        weights = tl.exp2(tl.minimum(scores * scale_log2e - log_sum[None, :], 0.0))
        d_weights = tl.dot(v, gradient.T, input_precision=INPUT_PRECISION)
        kept_weights = weights
        if DROPOUT:
            kept = keeps_attention(
                tl.load(seed_ptr),
                (query + rows)[None, :],
                (first_key + keys)[:, None],
                head,
                dropout_p,
            )
            kept_weights = tl.where(kept, weights * keep_scale, 0.0)
            d_weights = tl.where(kept, d_weights * keep_scale, 0.0)
        if not ONE_PASS:
            delta = tl.load(delta_ptr + vector_at, mask=live, other=0.0)
        d_v = tl.dot(kept_weights.to(v.dtype), gradient, d_v, input_precision=INPUT_PRECISION)
        d_scores = (weights * (d_weights - delta[None, :])).to(k.dtype)
        d_k = tl.dot(d_scores, q, d_k, input_precision=INPUT_PRECISION)
        if ONE_PASS:
            d_q = tl.dot(d_scores.T, k, input_precision=INPUT_PRECISION)
            store_rows(
                d_qkv_ptr + q_at, d_q * scale, num_queries, stride, BLOCK_QUERIES, D, BLOCK_D
            )
    store_rows(d_qkv_ptr + k_at, d_k * scale, num_keys, stride, BLOCK_KEYS, D, BLOCK_D)
    store_rows(d_qkv_ptr + k_at + D, d_v, num_keys, stride, BLOCK_KEYS, D, BLOCK_D)
