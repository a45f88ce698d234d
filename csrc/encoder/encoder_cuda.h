// All kept layers of an encoder as one kernel, for few tokens (sm_90a). No torch header here.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace dynabert {

// Sizes that a plan is made for. Those of a call may be smaller where it says "at most".
struct EncoderShape {
  int tokens;            // rows, at most 512; those past the last sequence give undefined values
  int sequences;         // at least 1
  int layers;            // entries of the layer list, at most 48
  int hidden_size;       // a multiple of 128, at most 1024
  int head_dim;          // 32 or 64
  int max_heads;         // of any layer; max_heads * head_dim at most 1024
  int max_intermediate;  // of any layer, at most 4096
};

// Pointers to one layer's tensors in device memory, bf16, 16-byte aligned, in the layout of
// csrc/layout.h. The elastic ones may be longer than the width of a call: prefixes are read.
struct EncoderLayer {
  const void* qkv_weight;             // [num_heads, 3, head_dim, hidden_size]
  const void* qkv_bias;               // [num_heads, 3, head_dim]
  const void* out_weight;             // [num_heads, head_dim, hidden_size]
  const void* out_bias;               // [hidden_size]
  const void* attention_norm_weight;  // [hidden_size]
  const void* attention_norm_bias;    // [hidden_size]
  const void* up_weight;              // [intermediate_size, hidden_size]
  const void* up_bias;                // [intermediate_size]
  const void* down_weight;            // [intermediate_size, hidden_size]
  const void* down_bias;              // [hidden_size]
  const void* ffn_norm_weight;        // [hidden_size]
  const void* ffn_norm_bias;          // [hidden_size]
};

// All pointers are device memory. What the kernel reads through them it reads when it runs: a
// captured launch serves every width and every choice of layers.
struct EncoderCall {
  const void* hidden;              // bf16 [tokens, hidden_size]: the embeddings' output
  void* output;                    // bf16 [tokens, hidden_size]; may be `hidden`
  const std::int32_t* cu_seqlens;  // [sequences + 1], from 0 to at most tokens
  const EncoderLayer* weights;     // of all layers of the model
  const std::int32_t* num_kept;    // [1], 0 .. shape.layers; 0 copies
  // Indices into `weights`, heads (1 .. max_heads) and neurons (1 .. max_intermediate) of each kept
  // layer, all [shape.layers]; the first num_kept count. With one_width heads and neurons are one
  // number each, of every layer. Widths out of range are brought into it.
  const std::int32_t* layer_list;
  const std::int32_t* num_heads;
  const std::int32_t* intermediate_size;
  bool one_width;
  float norm_eps;
  void* workspace;  // encoder_workspace_bytes() bytes, 256-byte aligned
};

// Why the current device cannot run this shape, or null. The text is static.
const char* encoder_why_not(const EncoderShape& shape);

// Bytes of workspace. They are to be zeroed once before the first call (the grid barrier counts on
// from there); a workspace serves one stream at a time and one device.
std::size_t encoder_workspace_bytes(const EncoderShape& shape);

// Post-norm BERT layers:
//   h = LN(attention(h) @ out + b + h)
//   h = LN(gelu(h @ up.T + b) @ down + b + h)
// with erf-GELU; float sums and statistics, bf16 between the products. The at most 8 parts of a sum
// over K pass from block to block as fp16: they must stay within 65504. Equal inputs give equal
// bits.
//
// Allocates nothing, synchronises nothing, can be captured in a graph. cudaErrorNotSupported where
// encoder_why_not() has a reason. The grid fills the device: a launch that shares it with other
// work waits until all its blocks fit.
cudaError_t encoder_forward(const EncoderShape& shape, const EncoderCall& call,
                            cudaStream_t stream);

}  // namespace dynabert
