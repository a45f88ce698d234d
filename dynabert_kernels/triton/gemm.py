"""Matrix products on a weight prefix, with the epilogues of both sublayers.

Letters: T tokens, N outputs, K inputs, C hidden size. Two forms, told apart by `W_IS_KN`:

    rows     out[T, N] = act(x[T, K] @ w[N, K].T + bias[N])        QKV and up; the prefix is on N
    columns  out[T, C] = x[T, K] @ w[K, C] + bias[C] + residual    out and down; the prefix is on K

Both exist twice: with pointers, for every card and for widths read on the device, and with tensor
descriptors (the copy engine of sm_90) for widths known on the host.

Width modes, `WIDTH_MODE`:

    0  The prefix is what N or K says.
    1  One int32 on the device (`bound_ptr[0]`), in units of `WIDTH_UNIT` rows of the weight.
    2  One bound per token (`row_bound_ptr [T]`) and the largest of every 128 tokens
       (`bound_ptr [ceil(T / 128)]`). A tile works up to the bound of its 128 tokens; the rows form
       writes zeros past a token's own bound, so that the columns form needs no mask per token. A
       weight past the largest bound of those 128 tokens is never read.

Device bounds are clamped to what the weight holds: a kernel cannot raise.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.activation import activate

# Tokens that share one bound in width mode 2. Every tile's BLOCK_M divides it.
WIDTH_GROUP = 128
_WIDTH_GROUP = tl.constexpr(WIDTH_GROUP)


@triton.jit
def _tile_position(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down the rows within bands of `GROUP_M`, so that tiles in flight
    together share weights and tokens in L2."""
    band = tile // (GROUP_M * num_n)
    first_m = band * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    within = tile % (GROUP_M * num_n)
    return first_m + within % height, within // height


@triton.jit
def _width_bound(bound_ptr, m, limit, WIDTH_MODE: tl.constexpr, WIDTH_UNIT, BLOCK_M: tl.constexpr):
    """Rows of the weight that this tile may read."""
    if WIDTH_MODE == 1:
        limit = tl.minimum(tl.maximum(tl.load(bound_ptr), 0) * WIDTH_UNIT, limit)
    elif WIDTH_MODE == 2:
        group = m * BLOCK_M // _WIDTH_GROUP
        limit = tl.minimum(tl.maximum(tl.load(bound_ptr + group), 0) * WIDTH_UNIT, limit)
    return limit


@triton.jit(do_not_specialize=["T"])
def linear_forward_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    w_ptr,  # [N, K] or [K, N], rows stride_w apart
    bias_ptr,  # [N]
    residual_ptr,  # [T, N]
    out_ptr,  # [T, N]; with SPLIT_K > 1 float32 partial sums [SPLIT_K, T, N], no epilogue
    bound_ptr,  # int32 [1] or [ceil(T / 128)]
    row_bound_ptr,  # int32 [T]
    T,
    N,
    K,
    stride_x,
    stride_w,
    stride_residual,
    stride_out,
    WIDTH_UNIT,
    W_IS_KN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDTH_MODE: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SPLIT_K * BLOCK_K
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program computes one tile of one split. Grid: (tiles, SPLIT_K)."""
    num_m = tl.cdiv(T, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    m, n = _tile_position(tl.program_id(0), num_m, num_n, GROUP_M)
    split = tl.program_id(1)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_end = N
    k_end = K
    if W_IS_KN:
        k_end = _width_bound(bound_ptr, m, K, WIDTH_MODE, WIDTH_UNIT, BLOCK_M)
    else:
        n_end = _width_bound(bound_ptr, m, N, WIDTH_MODE, WIDTH_UNIT, BLOCK_M)
        if n * BLOCK_N >= n_end:
            return

    # Offsets within a tile fit 32 bits; only its corner needs 64.
    row = (m * BLOCK_M).to(tl.int64)
    local_rows = tl.arange(0, BLOCK_M)
    # Rows and outputs past the end read the tile's first one instead of being masked: their results
    # are never stored, and the loop stays free of predicates.
    safe_rows = tl.where(rows < T, local_rows, 0)
    ks = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + row * stride_x + (safe_rows[:, None] * stride_x + ks[None, :])
    steps = tl.cdiv(tl.cdiv(k_end, BLOCK_K), SPLIT_K)
    k_begin = split * steps * BLOCK_K
    k_stop = tl.minimum(k_begin + steps * BLOCK_K, k_end)
    # Whole steps need no mask on k; the ragged last one is outside the loop, which would otherwise
    # lose its wide asynchronous copies.
    k_whole = tl.minimum(k_stop, k_end // BLOCK_K * BLOCK_K)
    k_tail = tl.maximum(k_whole, k_begin)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if W_IS_KN:
        w_tile = w_ptr + (ks[:, None] * stride_w + cols[None, :])
        for k in range(k_begin, k_whole, BLOCK_K):
            x = tl.load(x_tile + k)
            w_rows = w_tile + tl.cast(k, tl.int64) * stride_w
            w = tl.load(w_rows) if EVEN_N else tl.load(w_rows, mask=(cols < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        if not EVEN_K:  # noqa: SIM102 (decided when compiling, the next when running)
            if k_tail < k_stop:
                live = k_tail + ks < k_stop
                x = tl.load(x_tile + k_tail, mask=live[None, :], other=0.0)
                w_rows = w_tile + tl.cast(k_tail, tl.int64) * stride_w
                w = tl.load(w_rows, mask=live[:, None] & (cols < N)[None, :], other=0.0)
                acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    else:
        safe_cols = tl.where(cols < n_end, tl.arange(0, BLOCK_N), 0)
        corner = (n * BLOCK_N).to(tl.int64) * stride_w
        w_tile = w_ptr + corner + (safe_cols[:, None] * stride_w + ks[None, :])
        for k in range(k_begin, k_whole, BLOCK_K):
            x = tl.load(x_tile + k)
            w = tl.load(w_tile + k)
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
        if not EVEN_K:  # noqa: SIM102 (decided when compiling, the next when running)
            if k_tail < k_stop:
                live = k_tail + ks < k_stop
                x = tl.load(x_tile + k_tail, mask=live[None, :], other=0.0)
                w = tl.load(w_tile + k_tail, mask=live[None, :], other=0.0)
                acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)

    stored = (rows < T)[:, None] & (cols < N)[None, :]
    if SPLIT_K > 1:
        out_tile = out_ptr + (split.to(tl.int64) * T + row) * stride_out
        tl.store(out_tile + (local_rows[:, None] * stride_out + cols[None, :]), acc, mask=stored)
    else:
        bias = tl.load(bias_ptr + cols, mask=cols < n_end, other=0.0)
        acc += bias.to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, EXACT)
        if HAS_RESIDUAL:
            residual_tile = residual_ptr + row * stride_residual
            at = local_rows[:, None] * stride_residual + cols[None, :]
            acc += tl.load(residual_tile + at, mask=stored, other=0.0).to(tl.float32)
        if WIDTH_MODE == 2 and not W_IS_KN:
            own = tl.load(row_bound_ptr + rows, mask=rows < T, other=0) * WIDTH_UNIT
            acc = tl.where(cols[None, :] < own[:, None], acc, 0.0)
        out_tile = out_ptr + row * stride_out
        acc = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_tile + (local_rows[:, None] * stride_out + cols[None, :]), acc, mask=stored)


@triton.jit
def _descriptor_tile(
    x_desc,
    w_desc,
    bias_ptr,
    residual_desc,
    out_desc,
    row,
    col,
    N,
    K,
    W_IS_KN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        x = x_desc.load([row, k * BLOCK_K])
        if W_IS_KN:
            w = w_desc.load([k * BLOCK_K, col])
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        else:
            w = w_desc.load([col, k * BLOCK_K])
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
    if SUBTILES == 1:
        _descriptor_epilogue(
            acc, bias_ptr, residual_desc, out_desc, row, col, N, ACTIVATION, HAS_RESIDUAL, EXACT
        )
    else:
        # Half a tile at a time: the staging buffer of the store halves, and with it a stage more
        # of the loop's fits.
        half: tl.constexpr = BLOCK_N // 2
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1))
        left, right = tl.split(halves)
        _descriptor_epilogue(
            left, bias_ptr, residual_desc, out_desc, row, col, N, ACTIVATION, HAS_RESIDUAL, EXACT
        )
        _descriptor_epilogue(
            right,
            bias_ptr,
            residual_desc,
            out_desc,
            row,
            col + half,
            N,
            ACTIVATION,
            HAS_RESIDUAL,
            EXACT,
        )


@triton.jit
def _descriptor_epilogue(
    acc,
    bias_ptr,
    residual_desc,
    out_desc,
    row,
    col,
    N,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr,
):
    cols = col + tl.arange(0, acc.shape[1])
    acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, EXACT)
    if HAS_RESIDUAL:
        acc += residual_desc.load([row, col]).to(tl.float32)
    out_desc.store([row, col], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["T"])
def linear_descriptor_forward_kernel(
    x_desc,  # [T, K] in tiles [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K] in tiles [BLOCK_N, BLOCK_K], or [K, N] in tiles [BLOCK_K, BLOCK_N]
    bias_ptr,  # [N]
    residual_desc,  # [T, N] in tiles [BLOCK_M, BLOCK_N / SUBTILES]
    out_desc,  # the same
    T,
    N,
    K,
    W_IS_KN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,  # 0: one program per tile
    FLATTEN: tl.constexpr,
):
    """One program computes the tiles ``program_id + i * NUM_PROGRAMS``. Past the end of a prefix
    the copy engine fills in zeros and stores nothing."""
    num_m = tl.cdiv(T, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    if NUM_PROGRAMS == 0:
        m, n = _tile_position(tl.program_id(0), num_m, num_n, GROUP_M)
        _descriptor_tile(
            x_desc,
            w_desc,
            bias_ptr,
            residual_desc,
            out_desc,
            m * BLOCK_M,
            n * BLOCK_N,
            N,
            K,
            W_IS_KN,
            ACTIVATION,
            HAS_RESIDUAL,
            INPUT_PRECISION,
            EXACT,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SUBTILES,
        )
    else:
        for tile in tl.range(tl.program_id(0), num_m * num_n, NUM_PROGRAMS, flatten=FLATTEN):
            m, n = _tile_position(tile, num_m, num_n, GROUP_M)
            _descriptor_tile(
                x_desc,
                w_desc,
                bias_ptr,
                residual_desc,
                out_desc,
                m * BLOCK_M,
                n * BLOCK_N,
                N,
                K,
                W_IS_KN,
                ACTIVATION,
                HAS_RESIDUAL,
                INPUT_PRECISION,
                EXACT,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SUBTILES,
            )
