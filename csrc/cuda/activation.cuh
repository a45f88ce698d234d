// Activations for epilogues; a NaN stays a NaN. Also plain C++, so that a test on the CPU can check
// them.

#pragma once

#include <cmath>

#include "types.h"

#ifdef __CUDACC__
#define DYNABERT_DEVICE __device__ __forceinline__
#else
#define DYNABERT_DEVICE inline
#endif

namespace dynabert {

namespace activation_detail {

DYNABERT_DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

}  // namespace activation_detail

// x * Phi(x), with an absolute error below 8e-7 for every x.
//
// With z = |x|, Phi(-z) = 2^q(z), and q is so smooth that degree 5 is enough; then
// gelu(x) = max(x, 0) - z * Phi(-z). The coefficients minimise the largest error of z * 2^q(z) on
// [0, 5.6] with q(0) = -1; beyond, q falls without bound. One special-function instruction and
// eight others, and no branch.
DYNABERT_DEVICE float gelu_erf(float x) {
  const float z = fabsf(x);
  float q = fmaf(-0.00048811722f, z, 0.0071988055f);
  q = fmaf(q, z, -0.052146804f);
  q = fmaf(q, z, -0.45959571f);
  q = fmaf(q, z, -1.1510006f);
  q = fmaf(q, z, -1.0f);
  const float tail = activation_detail::exp2_fast(q);
  // The tail is zero long before the bound, which keeps infinity times zero out.
  return fmaf(-fminf(z, 64.0f), tail, fmaxf(x, 0.0f));
}

// x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + 2^(-2 u log2 e)).
DYNABERT_DEVICE float gelu_tanh(float x) {
  const float exponent = x * fmaf(-0.10294324f, x * x, -2.3022082f);
  const float divisor = 1.0f + activation_detail::exp2_fast(exponent);
#ifdef __CUDA_ARCH__
  return __fdividef(x, divisor);
#else
  return x / divisor;
#endif
}

DYNABERT_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

template <Activation kActivation>
DYNABERT_DEVICE float activate(float x) {
  if constexpr (kActivation == Activation::kGelu) {
    return gelu_erf(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu_tanh(x);
  } else if constexpr (kActivation == Activation::kRelu) {
    return relu(x);
  } else {
    return x;
  }
}

}  // namespace dynabert
