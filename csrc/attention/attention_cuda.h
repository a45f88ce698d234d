// The attention sublayer on a CUDA card: QKV, softmax over the keys, out, residual, LayerNorm.
//
// Letters as in csrc/layout.h, T tokens. Nothing is allocated and nothing waits on the host; a call
// may be captured in a graph. Pointers are multiples of 16 bytes, strides multiples of 8 elements.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../cuda/types.h"

namespace dynabert {

// out = LayerNorm(softmax(Q K^T / sqrt(D)) V @ out_weight[:h] + out_bias + residual), with Q, K and
// V of the first h heads from x @ qkv_weight[:h].T + qkv_bias[:h]. Q, K, V, the context and the
// projection are rounded to `compute`; the residual is added in float.
struct AttentionCall {
  ElementType compute;  // kBfloat16 or kFloat16: x, and both weights with their biases
  ElementType hidden_type;
  ElementType norm_type;
  const void* x;            // [T, C]
  const void* residual;     // [T, C] in hidden_type; may be x
  const void* qkv_weight;   // [H, 3, D, C]
  const void* qkv_bias;     // [H, 3, D]
  const void* out_weight;   // [H, D, C]
  const void* out_bias;     // [C]
  const void* norm_weight;  // [C] in norm_type
  const void* norm_bias;    // [C] in norm_type
  float norm_eps;
  void* out;  // [T, C] in hidden_type, contiguous; past the last offset its rows are undefined
  std::int64_t x_stride;
  std::int64_t residual_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;        // C
  std::int32_t full_width;         // H
  std::int32_t head_dim;           // D
  Widths heads;                    // h, of all sequences or of each
  const std::int32_t* cu_seqlens;  // [batch + 1] in device memory, ascending from 0 to at most T
  std::int32_t batch;
  std::int32_t max_seqlen;  // no sequence is longer
  void* workspace;          // attention_workspace_bytes(call), a multiple of 256 bytes, any content
  void* norm_workspace;     // zeros, gemm_norm_workspace_bytes(); null: LayerNorm is its own kernel
};

// Why this device cannot run the call, as static text, or null. Pointers to tensors are not looked
// at.
const char* attention_why_not(const AttentionCall& call);

std::size_t attention_workspace_bytes(const AttentionCall& call);

cudaError_t attention_forward(const AttentionCall& call, cudaStream_t stream);

}  // namespace dynabert
