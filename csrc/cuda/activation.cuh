// GELU by the error function, for epilogues. Also plain C++, so that a test on the CPU can check
// it.

#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DYNABERT_DEVICE __device__ __forceinline__
#else
#define DYNABERT_DEVICE inline
#endif

namespace dynabert {

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
  float tail;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(q));
#else
  tail = exp2f(q);
#endif
  return fmaf(-z, tail, fmaxf(x, 0.0f));
}

}  // namespace dynabert
