// out = LayerNorm(projected + residual) over the hidden size, in float.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "types.h"

namespace dynabert {

inline constexpr std::int32_t kMaxNormHiddenSize = 8192;

// Pointers are multiples of 16 bytes, strides multiples of 8 elements. `out` may be `projected` or
// `residual`, element for element.
struct LayerNormCall {
  ElementType projected_type;  // kBfloat16 or kFloat16
  ElementType hidden_type;     // of residual and out
  ElementType norm_type;       // of norm_weight and norm_bias
  const void* projected;       // [T, C] or null
  const void* residual;        // [T, C]
  const void* norm_weight;     // [C]
  const void* norm_bias;       // [C]
  void* out;                   // [T, C]
  std::int64_t projected_stride;
  std::int64_t residual_stride;
  std::int64_t out_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;  // C, a multiple of 8, at most kMaxNormHiddenSize
  float norm_eps;
};

cudaError_t layer_norm(const LayerNormCall& call, cudaStream_t stream);

}  // namespace dynabert
