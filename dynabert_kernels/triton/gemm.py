"""Matrix products on a weight prefix, with the epilogues of both sublayers.

Letters: T tokens, N outputs, K inputs. Three forms, which read a weight in two ways:

    rows      act(x[T, K] @ w[N, K].T + bias[N])              QKV and up; the prefix is on N
    gradient  x[T, K] @ w[N, K].T * act'(before[T, N])        d before, from the gradient of down
    columns   dropout(x[T, K] @ w[K, N] + bias[N]) + residual out, down, d hidden; prefix on K

All exist twice: with pointers for every card, and with tensor descriptors (the copy engine of
sm_90). The prefix is what N or K says, or with a table of `row_tiles` the width of each tile:
nothing past it enters a result.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.activation import activate, activate_with_slope
from dynabert_kernels.triton.dropout import keeps_hidden


@triton.jit
def _tile_position(tile, num_m, num_n, BAND: tl.constexpr = 8):
    """Row and column of a tile: down the rows within bands of BAND row blocks.

    Programs in flight together then share weights and tokens in L2.
    """
    band = tile // (num_n * BAND)
    first_m = band * BAND
    height = tl.minimum(num_m - first_m, BAND)
    within = tile % (num_n * BAND)
    return first_m + within % height, within // height


@triton.jit
def _num_used(table_ptr, num_tiles, BLOCK: tl.constexpr = 128):
    """Tiles of a table that have any rows."""
    num_used = 0
    for start in range(0, num_tiles, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        ends = tl.load(table_ptr + tiles * 3 + 1, mask=tiles < num_tiles, other=0)
        num_used += tl.sum((ends > 0).to(tl.int32), 0)
    return num_used


@triton.jit
def _finished(
    acc,
    other,  # before or residual, like acc; anything in form rows
    bias_ptr,
    seed_ptr,
    rows,
    cols,
    N,
    dropout_p,
    dropout_scale,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Both results of a tile of accumulators, float32; form columns has just the first."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    second = acc
    if FORM == "rows":
        acc = activate(acc, ACTIVATION, EXACT)
    elif FORM == "gradient":
        second, slope = activate_with_slope(other.to(tl.float32), ACTIVATION, EXACT)
        acc = acc * slope
    else:
        if seed_ptr is not None:
            kept = keeps_hidden(tl.load(seed_ptr), rows, cols, N, dropout_p)
            acc = tl.where(kept, acc * dropout_scale, 0.0)
        acc += other.to(tl.float32)
    return acc, second


@triton.jit(do_not_specialize=["T", "num_row_blocks"])
def product_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    w_ptr,  # [N, K], or [K, N] in form columns; contiguous
    bias_ptr,  # [N] or None
    other_ptr,  # [T, N]: before or residual, rows stride_other apart; or None
    out_ptr,  # [T, N]; with SPLIT_K > 1 float32 partial sums [SPLIT_K, T, N], no epilogue
    second_ptr,  # [T, N] or None: the value before the activation, or the activated one
    table_ptr,  # tiles of rows, see `row_tiles`; or None
    seed_ptr,  # [1] or None
    T,
    N,
    K,
    num_row_blocks,
    unit,
    stride_x,
    stride_other,
    dropout_p,
    dropout_scale,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_K: tl.constexpr,  # K, or with a table every width of it, is a multiple of BLOCK_K
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    SPLIT_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes one tile over one share of K. Grid: (tiles, SPLIT_K)."""
    m, n = _tile_position(tl.program_id(0), num_row_blocks, tl.cdiv(N, BLOCK_N))
    split = tl.program_id(1)
    first = m * BLOCK_M
    end = T
    # Outputs and inputs of this tile; N and K stay the distances between rows.
    outputs = N
    inputs = K
    if table_ptr is not None:
        first = tl.load(table_ptr + m * 3)
        end = tl.load(table_ptr + m * 3 + 1)
        width = tl.load(table_ptr + m * 3 + 2) * unit
        if FORM == "columns":
            inputs = width
        else:
            outputs = width
    if (first >= end) | (n * BLOCK_N >= outputs):
        return
    # Offsets within a tile fit 32 bits; only its corner needs 64.
    row = first.to(tl.int64)
    local_rows = tl.arange(0, BLOCK_M)
    rows = first + local_rows
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end read the tile's first one instead of being masked: their results
    # are never stored, and the loop stays free of predicates.
    safe_rows = tl.where(rows < end, local_rows, 0)
    x_tile = x_ptr + row * stride_x + (safe_rows[:, None] * stride_x + ks[None, :])
    share = tl.cdiv(tl.cdiv(inputs, BLOCK_K), SPLIT_K) * BLOCK_K
    k_begin = split * share
    k_end = tl.minimum(k_begin + share, inputs)
    # Whole steps need no mask on k; the ragged last one is outside the loop, which would otherwise
    # lose its wide asynchronous copies.
    k_whole = tl.minimum(k_end, inputs // BLOCK_K * BLOCK_K)
    k_tail = tl.maximum(k_whole, k_begin)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FORM == "columns":
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
        safe_cols = tl.where(cols < outputs, tl.arange(0, BLOCK_N), 0)
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

    stored = (rows < end)[:, None] & (cols < outputs)[None, :]
    out_at = row * N + (local_rows[:, None] * N + cols[None, :])
    if SPLIT_K > 1:
        tl.store(out_ptr + split.to(tl.int64) * T * N + out_at, acc, mask=stored)
    else:
        other = acc
        if other_ptr is not None:
            other_at = local_rows[:, None] * stride_other + cols[None, :]
            other = tl.load(other_ptr + row * stride_other + other_at, mask=stored, other=0.0)
        elif FORM == "columns":
            other = tl.zeros_like(acc)
        out, second = _finished(
            acc,
            other,
            bias_ptr,
            seed_ptr,
            rows,
            cols,
            N,
            dropout_p,
            dropout_scale,
            FORM,
            ACTIVATION,
            EXACT,
        )
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=stored)
        if second_ptr is not None:
            tl.store(second_ptr + out_at, second.to(second_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _finish_columns(
    acc,  # [BLOCK_M, WIDTH] accumulators of the tile at (row, col)
    bias_ptr,
    other_desc,
    out_desc,
    second_desc,
    out_ptr,
    second_ptr,
    seed_ptr,
    row,
    col,
    end,
    N,
    dropout_p,
    dropout_scale,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Epilogue and stores of some columns of a tile."""
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, WIDTH)
    other = acc
    if other_desc is not None:
        other = other_desc.load([row, col])
    elif FORM == "columns":
        other = tl.zeros_like(acc)
    out, second = _finished(
        acc,
        other,
        bias_ptr,
        seed_ptr,
        rows,
        cols,
        N,
        dropout_p,
        dropout_scale,
        FORM,
        ACTIVATION,
        EXACT,
    )
    whole = row + BLOCK_M <= end
    if TILED and not whole:
        # The rows below belong to another tile, of another width.
        stored = (rows < end)[:, None] & (cols < N)[None, :]
        at = rows.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(out_ptr + at, out.to(out_desc.dtype), mask=stored)
        if second_desc is not None:
            tl.store(second_ptr + at, second.to(second_desc.dtype), mask=stored)
    else:
        out_desc.store([row, col], out.to(out_desc.dtype))
        if second_desc is not None:
            second_desc.store([row, col], second.to(second_desc.dtype))


@triton.jit
def _descriptor_tile(
    x_desc,
    w_desc,
    bias_ptr,
    other_desc,
    out_desc,
    second_desc,
    out_ptr,
    second_ptr,
    seed_ptr,
    row,
    end,
    n,
    N,
    inputs,
    dropout_p,
    dropout_scale,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    TILED: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    """Compute and store the tile at (row, n * BLOCK_N)."""
    col = n * BLOCK_N
    # Without a table the descriptors end where the prefix does, and the copy engine fills in zeros.
    k_whole = inputs
    if not EVEN_K:
        k_whole = inputs // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, k_whole, BLOCK_K):
        x = x_desc.load([row, k])
        if FORM == "columns":
            w = w_desc.load([k, col])
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        else:
            w = w_desc.load([col, k])
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
    if not EVEN_K:  # noqa: SIM102 (decided when compiling, the next when running)
        if k_whole < inputs:
            live = k_whole + tl.arange(0, BLOCK_K) < inputs
            x = x_desc.load([row, k_whole])
            x = tl.where(live[None, :], x, tl.zeros_like(x))
            w = w_desc.load([k_whole, col])
            w = tl.where(live[:, None], w, tl.zeros_like(w))
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)

    if SUBTILES == 2:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _finish_columns(
            left,
            bias_ptr,
            other_desc,
            out_desc,
            second_desc,
            out_ptr,
            second_ptr,
            seed_ptr,
            row,
            col,
            end,
            N,
            dropout_p,
            dropout_scale,
            FORM,
            ACTIVATION,
            EXACT,
            TILED,
            BLOCK_M,
            BLOCK_N // 2,
        )
        _finish_columns(
            right,
            bias_ptr,
            other_desc,
            out_desc,
            second_desc,
            out_ptr,
            second_ptr,
            seed_ptr,
            row,
            col + BLOCK_N // 2,
            end,
            N,
            dropout_p,
            dropout_scale,
            FORM,
            ACTIVATION,
            EXACT,
            TILED,
            BLOCK_M,
            BLOCK_N // 2,
        )
    else:
        _finish_columns(
            acc,
            bias_ptr,
            other_desc,
            out_desc,
            second_desc,
            out_ptr,
            second_ptr,
            seed_ptr,
            row,
            col,
            end,
            N,
            dropout_p,
            dropout_scale,
            FORM,
            ACTIVATION,
            EXACT,
            TILED,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["T", "num_row_blocks"])
def product_descriptor_kernel(
    x_desc,  # [T, K] in tiles [BLOCK_M, BLOCK_K]
    w_desc,  # [N, K] in tiles [BLOCK_N, BLOCK_K], or [K, N] in tiles [BLOCK_K, BLOCK_N]
    bias_ptr,  # [N] or None
    other_desc,  # [T, N] in tiles [BLOCK_M, BLOCK_N // SUBTILES], or None; see `product_kernel`
    out_desc,  # the same
    second_desc,  # the same, or None
    out_ptr,
    second_ptr,
    table_ptr,
    seed_ptr,
    T,
    N,
    K,
    num_row_blocks,
    unit,
    dropout_p,
    dropout_scale,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILES: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One program computes one tile, or every num_programs-th one. Grid: (programs,)."""
    outputs = N
    inputs = K
    if PERSISTENT:
        if table_ptr is not None:
            # All tiles have one width, and rows below the last of them may be written.
            outputs = tl.load(table_ptr + 2) * unit
            num_row_blocks = _num_used(table_ptr, num_row_blocks)
        num_n = tl.cdiv(outputs, BLOCK_N)
        num_tiles = num_row_blocks * num_n
        # One flat loop: the copies of the next tile start before the epilogue of this one.
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            m, n = _tile_position(tile, num_row_blocks, num_n)
            _descriptor_tile(
                x_desc,
                w_desc,
                bias_ptr,
                other_desc,
                out_desc,
                second_desc,
                out_ptr,
                second_ptr,
                seed_ptr,
                m * BLOCK_M,
                T,
                n,
                N,
                K,
                dropout_p,
                dropout_scale,
                FORM,
                ACTIVATION,
                EXACT,
                False,
                EVEN_K,
                INPUT_PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SUBTILES,
            )
    else:
        m, n = _tile_position(tl.program_id(0), num_row_blocks, tl.cdiv(N, BLOCK_N))
        row = m * BLOCK_M
        end = T
        if table_ptr is not None:
            row = tl.load(table_ptr + m * 3)
            end = tl.load(table_ptr + m * 3 + 1)
            width = tl.load(table_ptr + m * 3 + 2) * unit
            if FORM == "columns":
                inputs = width
            else:
                outputs = width
            if (row >= end) | (n * BLOCK_N >= outputs):
                return
        _descriptor_tile(
            x_desc,
            w_desc,
            bias_ptr,
            other_desc,
            out_desc,
            second_desc,
            out_ptr,
            second_ptr,
            seed_ptr,
            row,
            end,
            n,
            N,
            inputs,
            dropout_p,
            dropout_scale,
            FORM,
            ACTIVATION,
            EXACT,
            table_ptr is not None,
            EVEN_K,
            INPUT_PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SUBTILES,
        )
