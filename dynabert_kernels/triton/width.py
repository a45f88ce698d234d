"""Widths per sequence, spread out to the tokens: what `gemm` reads in width mode 2."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "num_sequences"])
def token_width_kernel(
    widths_ptr,  # int32 [num_sequences]
    cu_seqlens_ptr,  # int32 [num_sequences + 1]
    row_bound_ptr,  # int32 [T], written
    bound_ptr,  # int32 [ceil(T / GROUP)], written
    T,
    num_sequences,
    GROUP: tl.constexpr,
):
    """One program writes the widths of `GROUP` tokens and their maximum. Grid: (groups,)."""
    group = tl.program_id(0)
    tokens = group * GROUP + tl.arange(0, GROUP)
    # The last sequence that starts at or before the token: those before it in place are empty.
    first = tl.zeros_like(tokens)
    last = first + num_sequences - 1
    span = num_sequences
    while span > 1:
        middle = (first + last + 1) // 2
        starts_before = tl.load(cu_seqlens_ptr + middle) <= tokens
        first = tl.where(starts_before, middle, first)
        last = tl.where(starts_before, last, middle - 1)
        span = (span + 1) // 2
    widths = tl.where(tokens < T, tl.load(widths_ptr + first), 0)
    tl.store(row_bound_ptr + tokens, widths, mask=tokens < T)
    tl.store(bound_ptr + group, tl.max(widths, axis=0))
