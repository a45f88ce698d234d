"""The FFN's activation functions as Triton device code."""

import triton
import triton.language as tl

# GELU(x) = x * Phi(x) with Phi(x) = 0.5 + x * P(s), s = 2 (x / 4.75)^2 - 1, for |x| <= 4.75 and
# exactly 0 or 1 outside: a weighted least-maximum fit with |error of GELU| < 1.7e-5, a thirtieth of
# bfloat16's rounding at 0.25. Multiplications only: `erf` costs about thirty instructions and a
# branch, and the special-function unit runs at an eighth of the rate of multiplications.
PHI_CLAMP = tl.constexpr(4.75)
PHI_SCALE = tl.constexpr(2.0 / (4.75 * 4.75))
INV_SQRT2 = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _gelu_polynomial(x):
    z = tl.minimum(tl.maximum(x, -PHI_CLAMP), PHI_CLAMP)
    s = z * z * PHI_SCALE - 1.0
    p = -0.002616442274302244 * s + 0.007461279630661011
    p = p * s - 0.009288514032959938
    p = p * s + 0.011844378896057606
    p = p * s - 0.020383719354867935
    p = p * s + 0.030783671885728836
    p = p * s - 0.040839601308107376
    p = p * s + 0.05320598930120468
    p = p * s - 0.0736524760723114
    p = p * s + 0.14874859154224396
    return x * (p * z + 0.5)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Activation of a float32 tile; `EXACT` asks for the erf itself (float32 outputs)."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * INV_SQRT2)) if EXACT else _gelu_polynomial(x)
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 1 - 2 / (exp(2u) + 1), which saturates without overflow at both ends.
        u = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))
    elif ACTIVATION == "relu":
        # `maximum` would turn a NaN into zero.
        x = tl.where(x < 0.0, 0.0, x)
    return x
