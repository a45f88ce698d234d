// Matrix products on a prefix of the weights, with their epilogues fused; Hopper (sm_90a) only.
//
// Everything is bfloat16, accumulated and finished in float. Letters as in csrc/layout.h, T tokens.
// Nothing is allocated and nothing waits on the host; launches may be captured in a graph. Tensors
// are row-major and start at a multiple of 16 bytes; strides are in elements, multiples of 8.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "tile_schedule.h"
#include "types.h"

namespace dynabert {

// out[t, n] = activation(sum_c x[t, c] * weight[n, c] + bias[n]) for n < width.rows().
//
// QKV: weight [H, 3, D, C] seen as [H * 3 * D, C], unit 3 * D. Up: weight [I, C], unit 1. Any width
// from 1 to full_width; beyond it `out` is undefined up to the next multiple of 8, beyond one in
// device memory up to that of 64.
struct GemmRowsSm90 {
  const void* x;       // [T, C]
  const void* weight;  // [full_width, C]
  const void* bias;    // [full_width]
  void* out;           // [T, >= width]
  std::int64_t x_stride;
  std::int64_t out_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;  // C, a multiple of 64
  std::int32_t full_width;   // rows of the weight
  PrefixWidth width;
  Activation activation;
};

cudaError_t gemm_rows_sm90(const GemmRowsSm90& args, cudaStream_t stream);

// out[t, c] = sum_n x[t, n] * weight[n, c] + bias[c] for n < width.rows(); plus residual[t, c] if
// that is given; then, if norm_weight is given too, LayerNorm over c.
//
// Out: weight [H, D, C] seen as [H * D, C], unit D. Down: weight [I, C], unit 1. Any width from 1
// to full_width; x beyond it is not used. `out` may be `residual`, element for element.
struct GemmColumnsSm90 {
  const void* x;            // [T, >= width]
  const void* weight;       // [full_width, C]
  const void* bias;         // [C]
  const void* residual;     // [T, C] or null
  const void* norm_weight;  // [C] or null
  const void* norm_bias;    // [C] or null
  void* norm_workspace;     // see below; null without LayerNorm
  void* out;                // [T, C]
  std::int64_t x_stride;
  std::int64_t residual_stride;
  std::int64_t out_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;  // C, a multiple of 64; with LayerNorm 768
  std::int32_t full_width;   // rows of the weight
  PrefixWidth width;
  float norm_eps;
};

// The hidden size whose row a group of blocks can hold, for the LayerNorm in the epilogue.
inline constexpr std::int32_t kFusedNormHiddenSize = 768;

// Size of norm_workspace on the current device. Filled with zeros once; every call leaves it so.
// Calls that may run at the same time need one each.
cudaError_t gemm_norm_workspace_bytes(std::size_t* bytes);

cudaError_t gemm_columns_sm90(const GemmColumnsSm90& args, cudaStream_t stream);

}  // namespace dynabert
