// softmax(Q K^T / sqrt(D)) V on ragged batches and a prefix of the heads, from sm_80 on.
//
// Products in bfloat16 or float16 with float sums; softmax in float. Nothing is allocated and
// nothing waits on the host; launches may be captured in a graph. Letters as in csrc/layout.h, T
// tokens, H = heads.limit.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cuda/types.h"

namespace dynabert {

// Pointers start at multiples of 16 bytes; strides are multiples of 8 elements. Of a head past its
// sequence's width, and of rows past the last offset, nothing is read or written.
struct AttentionCore {
  ElementType type;         // kBfloat16 or kFloat16
  const void* qkv;          // [T, H, 3, D]
  void* context;            // [T, H, D]
  std::int64_t qkv_stride;  // elements between tokens
  std::int64_t context_stride;
  const std::int32_t* cu_seqlens;  // [batch + 1] in device memory, ascending from 0 to at most T
  std::int32_t batch;
  std::int32_t tokens;      // T
  std::int32_t max_seqlen;  // no sequence is longer
  std::int32_t head_dim;    // D: 32, 64, 80 or 128
  Widths heads;
};

// A translation unit each.
cudaError_t attention_core_bf16(const AttentionCore& call, cudaStream_t stream);
cudaError_t attention_core_fp16(const AttentionCore& call, cudaStream_t stream);

// The result of a sequence does not depend on the batch it is in.
inline cudaError_t attention_core(const AttentionCore& call, cudaStream_t stream) {
  if (call.tokens < 0 || call.batch < 0 || call.heads.limit < 0) return cudaErrorInvalidValue;
  for (const std::int64_t stride : {call.qkv_stride, call.context_stride}) {
    if (stride % 8 != 0 || stride < 0 || stride > 0x7fffffff) return cudaErrorInvalidValue;
  }
  if (call.tokens == 0 || call.batch == 0 || call.heads.limit == 0 || call.max_seqlen < 1) {
    return cudaSuccess;
  }
  switch (call.type) {
    case ElementType::kBfloat16:
      return attention_core_bf16(call, stream);
    case ElementType::kFloat16:
      return attention_core_fp16(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

constexpr bool attention_core_has(std::int32_t head_dim) {
  return head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 128;
}

}  // namespace dynabert
