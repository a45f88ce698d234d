"""Bias, residual and LayerNorm of a row, the end of both sublayers."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def residual_norm_forward_kernel(
    x_ptr,  # [T, C] with bias and residual added, or float32 partial sums [NUM_PARTS, T, C] without
    bias_ptr,  # [C]
    residual_ptr,  # [T, C], rows stride_residual apart
    weight_ptr,  # [C]
    norm_bias_ptr,  # [C]
    out_ptr,  # [T, C]
    T,
    C,
    stride_residual,
    eps,
    NUM_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program normalises one row; partial sums are added in their order. Grid: (T,).

    Mean first and then squared deviations, both from registers: the variance as a difference of
    two large sums would lose half the digits.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    live = cols < C
    x_row = x_ptr + row * C
    x = tl.load(x_row + cols, mask=live, other=0.0).to(tl.float32)
    if NUM_PARTS > 1:
        for part in tl.static_range(1, NUM_PARTS):
            offset = tl.cast(part, tl.int64) * T * C
            x += tl.load(x_row + offset + cols, mask=live, other=0.0)
        x += tl.load(bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
        residual_row = residual_ptr + row * stride_residual
        x += tl.load(residual_row + cols, mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    centred = tl.where(live, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / C
    weight = tl.load(weight_ptr + cols, mask=live, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + cols, mask=live, other=0.0).to(tl.float32)
    y = centred / tl.sqrt(variance + eps) * weight + norm_bias
    tl.store(out_ptr + row * C + cols, y.to(out_ptr.dtype.element_ty), mask=live)
