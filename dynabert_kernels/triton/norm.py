"""Bias, dropout, residual and LayerNorm of a row, the end of both sublayers, and their gradients.

Letters: T tokens, C channels. A program keeps the parameters of the norm in registers and goes over
several rows. Mean first and then squared deviations, both from registers: the variance as a
difference of two large sums would lose half the digits.
"""

import triton
import triton.language as tl

from dynabert_kernels.triton.dropout import keeps_hidden


@triton.jit
def _rows_in_use(T, num_tokens_ptr, BOUNDED: tl.constexpr):
    """How many of T rows hold tokens."""
    if BOUNDED:
        return tl.minimum(T, tl.load(num_tokens_ptr))
    return T


@triton.jit
def _load_rows(ptr, begin, end, local_rows, cols, C, stride):
    """Rows from `begin` on, zero from `end` on and past C."""
    tile = ptr + tl.cast(begin, tl.int64) * stride
    mask = (begin + local_rows < end)[:, None] & (cols < C)[None, :]
    return tl.load(tile + local_rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _apply_dropout(x, seed, tokens, channels, C, dropout_p, dropout_scale):
    keeps = keeps_hidden(seed, tokens, channels, C, dropout_p)
    return tl.where(keeps, x * dropout_scale, 0.0)


@triton.jit(do_not_specialize=["T", "dropout_p", "dropout_scale", "steps"])
def residual_norm_forward_kernel(
    x_ptr,  # [T, C] with bias and residual added, or float32 partial sums [NUM_PARTS, T, C] without
    bias_ptr,  # [C]
    residual_ptr,  # [T, C], rows stride_residual apart
    weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    out_ptr,  # [T, C]
    total_ptr,  # [T, C] with KEEP_TOTAL
    num_tokens_ptr,  # [1], int32, with BOUNDED
    seed_ptr,  # [1], int64, with HAS_DROPOUT
    T,
    C,
    stride_residual,
    eps,
    dropout_p,
    dropout_scale,
    steps,
    HAS_PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KEEP_TOTAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises `steps` blocks of rows; partial sums are added in their order.

    Grid: (cdiv(T, steps * BLOCK_T),).
    """
    first = tl.program_id(0) * steps * BLOCK_T
    cols = tl.arange(0, BLOCK_C)
    live = cols < C
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_PARTS:
        bias = tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    end = tl.minimum(_rows_in_use(T, num_tokens_ptr, BOUNDED), first + steps * BLOCK_T)
    local_rows = tl.arange(0, BLOCK_T)
    for begin in range(first, end, BLOCK_T):
        stored = (begin + local_rows < end)[:, None] & live[None, :]
        corner = tl.cast(begin, tl.int64) * C
        at = local_rows[:, None] * C + cols[None, :]
        x = _load_rows(x_ptr, begin, end, local_rows, cols, C, C).to(tl.float32)
        if HAS_PARTS:
            for part in tl.static_range(1, NUM_PARTS):
                offset = tl.cast(part, tl.int64) * T * C
                x += tl.load(x_ptr + offset + corner + at, mask=stored, other=0.0)
            x += bias[None, :]
            if HAS_DROPOUT:
                rows = begin + local_rows
                x = _apply_dropout(x, seed, rows, cols, C, dropout_p, dropout_scale)
            residual_rows = residual_ptr + tl.cast(begin, tl.int64) * stride_residual
            residual_at = local_rows[:, None] * stride_residual + cols[None, :]
            x += tl.load(residual_rows + residual_at, mask=stored, other=0.0).to(tl.float32)
            if KEEP_TOTAL:
                tl.store(total_ptr + corner + at, x.to(total_ptr.dtype.element_ty), mask=stored)
        mean = tl.sum(x, axis=1) / C
        centred = tl.where(live[None, :], x - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        y = centred * scale[:, None] * weight[None, :] + norm_bias[None, :]
        tl.store(out_ptr + corner + at, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["T", "dropout_p", "dropout_scale", "steps"])
def residual_norm_backward_kernel(
    gradient_ptr,  # [T, C], rows stride_gradient apart
    total_ptr,  # [T, C], rows stride_total apart
    weight_ptr,  # [C]
    total_gradient_ptr,  # [T, C]
    projected_gradient_ptr,  # [T, C] with SEPARATE
    partial_ptr,  # float32 [programs, 3, C]: norm weight, norm bias, bias
    num_tokens_ptr,  # [1], int32, with BOUNDED
    seed_ptr,  # [1], int64, with HAS_DROPOUT
    T,
    C,
    stride_gradient,
    stride_total,
    eps,
    dropout_p,
    dropout_scale,
    steps,
    HAS_DROPOUT: tl.constexpr,
    SEPARATE: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes `steps` blocks of rows and their share of the parameters' gradients.

    Grid: (cdiv(T, steps * BLOCK_T),). The projected gradient is that of the sum through dropout.
    """
    first = tl.program_id(0) * steps * BLOCK_T
    cols = tl.arange(0, BLOCK_C)
    live = cols < C
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    weight_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    end = tl.minimum(_rows_in_use(T, num_tokens_ptr, BOUNDED), first + steps * BLOCK_T)
    local_rows = tl.arange(0, BLOCK_T)
    for begin in range(first, end, BLOCK_T):
        stored = (begin + local_rows < end)[:, None] & live[None, :]
        row = tl.cast(begin, tl.int64)
        x = _load_rows(total_ptr, begin, end, local_rows, cols, C, stride_total).to(tl.float32)
        gradient = _load_rows(gradient_ptr, begin, end, local_rows, cols, C, stride_gradient)
        gradient = gradient.to(tl.float32)
        mean = tl.sum(x, axis=1) / C
        centred = tl.where(live[None, :], x - mean[:, None], 0.0)
        weighted = gradient * weight[None, :]
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
        # Rows past the end have no scale where eps is zero.
        normed = tl.where(stored, centred * scale[:, None], 0.0)
        along = tl.sum(weighted * normed, axis=1) / C
        level = tl.sum(weighted, axis=1) / C
        by_x = (weighted - level[:, None] - normed * along[:, None]) * scale[:, None]
        at = local_rows[:, None] * C + cols[None, :]
        tl.store(
            total_gradient_ptr + row * C + at,
            by_x.to(total_gradient_ptr.dtype.element_ty),
            mask=stored,
        )
        weight_sum += tl.sum(gradient * normed, axis=0)
        norm_bias_sum += tl.sum(gradient, axis=0)
        if HAS_DROPOUT:
            rows = begin + local_rows
            by_x = _apply_dropout(by_x, seed, rows, cols, C, dropout_p, dropout_scale)
        if SEPARATE:
            tl.store(
                projected_gradient_ptr + row * C + at,
                by_x.to(projected_gradient_ptr.dtype.element_ty),
                mask=stored,
            )
        bias_sum += tl.sum(tl.where(stored, by_x, 0.0), axis=0)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 3 * C + cols
    tl.store(partial, weight_sum, mask=live)
    tl.store(partial + C, norm_bias_sum, mask=live)
    tl.store(partial + 2 * C, bias_sum, mask=live)


@triton.jit(do_not_specialize=["num_parts"])
def add_partial_vectors_kernel(
    partial_ptr,  # float32 [num_parts, 3, C]
    first_ptr,  # float32 [C]
    second_ptr,  # float32 [C]
    third_ptr,  # float32 [C]
    num_parts,
    C,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds a block of channels of one of three vectors. Grid: (cdiv(C, BLOCK_C), 3)."""
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = cols < C
    acc = tl.zeros((BLOCK_PARTS, BLOCK_C), dtype=tl.float32)
    for begin in range(0, num_parts, BLOCK_PARTS):
        parts = begin + tl.arange(0, BLOCK_PARTS)
        at = parts.to(tl.int64)[:, None] * 3 * C + which * C + cols[None, :]
        mask = (parts < num_parts)[:, None] & live[None, :]
        acc += tl.load(partial_ptr + at, mask=mask, other=0.0)
    out_ptr = first_ptr
    if which == 1:
        out_ptr = second_ptr
    if which == 2:
        out_ptr = third_ptr
    tl.store(out_ptr + cols, tl.sum(acc, axis=0), mask=live)
