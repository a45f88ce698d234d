"""The FFN's activation functions and their slopes as Triton device code."""

import triton
import triton.language as tl

_INV_SQRT2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _normal_cdf(x, EXACT: tl.constexpr):
    """Share of the normal distribution below `x`.

    In half precision the error function is what a product with GELU waits for, so results that are
    rounded to it get 0.5 + x P(x^2), cut off at 0 and 1: eleven instructions, none of them slow.
    P has the least largest error of x Phi(x) for |x| <= 4.4, where the cut-off begins: 4.5e-5, and
    2.5e-5 for |x| < 2, against a rounding error of 2.4e-4 (float16) at 1.
    """
    if EXACT:
        share = 0.5 * (1.0 + tl.erf(x * _INV_SQRT2))
    else:
        s = tl.minimum(x * x, 19.36)
        p = 3.57132657e-11 * s - 3.7555794e-09
        p = p * s + 1.74135778e-07
        p = p * s - 4.72577858e-06
        p = p * s + 8.43023663e-05
        p = p * s - 1.05504796e-03
        p = p * s + 9.64320824e-03
        p = p * s - 6.60767108e-02
        p = p * s + 3.98761749e-01
        share = tl.clamp(x * p + 0.5, 0.0, 1.0)
    return share


@triton.jit
def _tanh_share(x):
    """0.5 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), without overflow at either end."""
    u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return 1.0 / (tl.exp(-2.0 * u) + 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Activation of a float32 tile.

    Args:
        x: Any shape.
        ACTIVATION: ``none`` or a name of `dynabert_kernels.layout.ACTIVATIONS`.
        EXACT: Whether the result must be right to float32.
    """
    if ACTIVATION == "gelu":
        x = x * _normal_cdf(x, EXACT)
    elif ACTIVATION == "gelu_tanh":
        x = x * _tanh_share(x)
    elif ACTIVATION == "relu":
        # `maximum` would turn a NaN into zero.
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """`activate` and its derivative, of a float32 tile."""
    if ACTIVATION == "gelu":
        share = _normal_cdf(x, EXACT)
        value = x * share
        slope = share + x * (tl.exp2(x * x * _MINUS_HALF_LOG2_E) * _INV_SQRT_2PI)
    elif ACTIVATION == "gelu_tanh":
        share = _tanh_share(x)
        value = x * share
        # Far out the slope of the share is zero, whatever the cube has become.
        near = tl.clamp(x, -50.0, 50.0)
        inner = 2.0 * _SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * near * near)
        # 1 - share, without cancellation.
        rest = _tanh_share(-x)
        slope = share + near * share * rest * inner
    elif ACTIVATION == "relu":
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return value, slope
