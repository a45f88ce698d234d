// The feed-forward sublayer on a CUDA card: up, activation, down, residual, LayerNorm.
//
// Letters as in csrc/layout.h, T tokens. Nothing is allocated and nothing waits on the host; a call
// may be captured in a graph. Pointers are multiples of 16 bytes, strides multiples of 8 elements.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../cuda/types.h"

namespace dynabert {

// out = LayerNorm(activation(x @ up[:n].T + up_bias[:n]) @ down[:n] + down_bias + residual). The
// products are rounded to `compute` before the residual is added in float.
struct FfnCall {
  ElementType compute;  // kBfloat16 or kFloat16: x, and both weights with their biases
  ElementType hidden_type;
  ElementType norm_type;
  Activation activation;
  const void* x;            // [T, C]
  const void* residual;     // [T, C] in hidden_type; may be x
  const void* up_weight;    // [I, C]
  const void* up_bias;      // [I]
  const void* down_weight;  // [I, C]
  const void* down_bias;    // [C]
  const void* norm_weight;  // [C] in norm_type
  const void* norm_bias;    // [C] in norm_type
  float norm_eps;
  void* out;  // [T, C] in hidden_type, contiguous
  std::int64_t x_stride;
  std::int64_t residual_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;        // C
  std::int32_t full_width;         // I
  Widths neurons;                  // n, of all sequences or of each
  const std::int32_t* cu_seqlens;  // [batch + 1]; used where neurons.num_each > 1
  std::int32_t batch;
  void* workspace;       // ffn_workspace_bytes(call), a multiple of 256 bytes, any content
  void* norm_workspace;  // zeros, gemm_norm_workspace_bytes(); null: LayerNorm is its own kernel
};

// Why this device cannot run the call, as static text, or null. Pointers to tensors are not looked
// at.
const char* ffn_why_not(const FfnCall& call);

std::size_t ffn_workspace_bytes(const FfnCall& call);

cudaError_t ffn_forward(const FfnCall& call, cudaStream_t stream);

}  // namespace dynabert
