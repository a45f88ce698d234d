"""Matrix products on a weight prefix, with the epilogues of both sublayers.

Letters: T tokens, N outputs, K inputs. Two forms, told apart by `W_IS_KN`:

    rows     out[T, N] = act(x[T, K] @ w[N, K].T + bias[N])        QKV and up; the prefix is on N
    columns  out[T, N] = x[T, K] @ w[K, N] + bias[N] + residual    out and down; the prefix is on K

Both exist twice: with pointers for every card, and with tensor descriptors (the copy engine of
sm_90). The prefix is what N or K says: no weight past it is read.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.activation import activate

# Row blocks of a band: programs in flight together share weights and tokens in L2.
_BAND = tl.constexpr(8)


@triton.jit
def _tile_position(tile, num_m, num_n):
    """Row and column of a tile: down the rows within bands of `_BAND` row blocks."""
    band = tile // (_BAND * num_n)
    first_m = band * _BAND
    height = tl.minimum(num_m - first_m, _BAND)
    within = tile % (_BAND * num_n)
    return first_m + within % height, within // height


@triton.jit(do_not_specialize=["T"])
def linear_forward_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    w_ptr,  # [N, K] or [K, N], contiguous
    bias_ptr,  # [N]
    residual_ptr,  # [T, N], rows stride_residual apart
    out_ptr,  # [T, N]; with SPLIT_K > 1 float32 partial sums [SPLIT_K, T, N], no epilogue
    T,
    N,
    K,
    stride_x,
    stride_residual,
    W_IS_KN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one tile over one share of K. Grid: (tiles, SPLIT_K)."""
    m, n = _tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N))
    split = tl.program_id(1)
    # Offsets within a tile fit 32 bits; only its corner needs 64.
    row = (m * BLOCK_M).to(tl.int64)
    local_rows = tl.arange(0, BLOCK_M)
    rows = m * BLOCK_M + local_rows
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end read the tile's first one instead of being masked: their results
    # are never stored, and the loop stays free of predicates.
    safe_rows = tl.where(rows < T, local_rows, 0)
    x_tile = x_ptr + row * stride_x + (safe_rows[:, None] * stride_x + ks[None, :])
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    k_begin = split * share
    k_end = tl.minimum(k_begin + share, K)
    # Whole steps need no mask on k; the ragged last one is outside the loop, which would otherwise
    # lose its wide asynchronous copies.
    k_whole = tl.minimum(k_end, K // BLOCK_K * BLOCK_K)
    k_tail = tl.maximum(k_whole, k_begin)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if W_IS_KN:
        w_tile = w_ptr + (ks[:, None] * N + cols[None, :])
        for k in range(k_begin, k_whole, BLOCK_K):
            x = tl.load(x_tile + k)
            w_step = w_tile + tl.cast(k, tl.int64) * N
            w = tl.load(w_step) if EVEN_N else tl.load(w_step, mask=(cols < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        if not EVEN_K:  # noqa: SIM102 (decided when compiling, the next when running)
            if k_tail < k_end:
                live = k_tail + ks < k_end
                x = tl.load(x_tile + k_tail, mask=live[None, :], other=0.0)
                w_step = w_tile + tl.cast(k_tail, tl.int64) * N
                w = tl.load(w_step, mask=live[:, None] & (cols < N)[None, :], other=0.0)
                acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    else:
        safe_cols = tl.where(cols < N, tl.arange(0, BLOCK_N), 0)
        corner = (n * BLOCK_N).to(tl.int64) * K
        w_tile = w_ptr + corner + (safe_cols[:, None] * K + ks[None, :])
        for k in range(k_begin, k_whole, BLOCK_K):
            x = tl.load(x_tile + k)
            w = tl.load(w_tile + k)
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
        if not EVEN_K:  # noqa: SIM102 (decided when compiling, the next when running)
            if k_tail < k_end:
                live = k_tail + ks < k_end
                x = tl.load(x_tile + k_tail, mask=live[None, :], other=0.0)
                w = tl.load(w_tile + k_tail, mask=live[None, :], other=0.0)
                acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)

    stored = (rows < T)[:, None] & (cols < N)[None, :]
    out_at = local_rows[:, None] * N + cols[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptr + (split.to(tl.int64) * T + row) * N + out_at, acc, mask=stored)
    else:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION)
        if HAS_RESIDUAL:
            residual_tile = residual_ptr + row * stride_residual
            at = local_rows[:, None] * stride_residual + cols[None, :]
            acc += tl.load(residual_tile + at, mask=stored, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * N + out_at, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["T"])
def linear_descriptor_forward_kernel(
    x_desc,  # [T, K] in tiles [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K] in tiles [BLOCK_N, BLOCK_K], or [K, N] in tiles [BLOCK_K, BLOCK_N]
    bias_ptr,  # [N]
    residual_desc,  # [T, N] in tiles [BLOCK_M, BLOCK_N]
    out_desc,  # the same
    T,
    N,
    K,
    W_IS_KN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one tile. Grid: (tiles,).

    Past the end of a prefix the copy engine fills in zeros and stores nothing.
    """
    m, n = _tile_position(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N))
    row = m * BLOCK_M
    col = n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])
        if W_IS_KN:
            w = w_desc.load([k, col])
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        else:
            w = w_desc.load([col, k])
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
    cols = col + tl.arange(0, BLOCK_N)
    acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if HAS_RESIDUAL:
        acc += residual_desc.load([row, col]).to(tl.float32)
    out_desc.store([row, col], acc.to(out_desc.dtype))
