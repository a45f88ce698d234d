"""The FFN's activation functions as Triton device code."""

import triton
import triton.language as tl

INV_SQRT2 = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Activation of a float32 tile: ``none`` or a name of `dynabert_kernels.layout.ACTIVATIONS`."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * INV_SQRT2))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2 - 2 / (exp(2u) + 1), which saturates without overflow at both ends.
        u = SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = x * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))
    elif ACTIVATION == "relu":
        # `maximum` would turn a NaN into zero.
        x = tl.where(x < 0.0, 0.0, x)
    return x
