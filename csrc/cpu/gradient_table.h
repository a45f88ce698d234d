// What the CPU kernels of every instruction set offer for training, free of torch.
//
// Letters as in kernel_table.h. float32 and bfloat16 only. Weights change with every step, so their
// panels are packed anew in each call; [..16] is a size rounded up to 16.

#pragma once

#include "cpu/kernel_table.h"

namespace dynabert {

// Tokens whose products are summed in registers before they join a weight gradient: the fixed
// blocks of that reduction.
constexpr std::int64_t kTokenChunk = 512;
// Tokens of a partial sum in the gradients of biases and LayerNorm.
constexpr std::int64_t kNormChunk = 64;

// Elements whose number is below `bound` are dropped, the others multiplied by `scale`; see
// dropout-inl.h.
struct Dropout {
  bool is_on, is_drawn;  // drawn: the seed is our own, not the caller's
  std::uint64_t seed;
  float bound, scale;
};

struct Matrix {
  Element element;
  const void* data;
  std::int64_t stride;  // elements from one row to the next
};

// Panels of 16 outputs, [steps][16] units each.
struct Operand {
  std::byte* data;
  std::int64_t panel_bytes;
};

// The tail of a sublayer: LayerNorm(dropout(product + bias) + hidden).
struct TailArgs {
  std::int64_t hidden_size;
  Rows rows;
  const float* bias;         // [C16]
  const float* norm_weight;  // [C16]
  const float* norm_bias;    // [C16]
  float eps;
  float* total;  // [T][C], what goes into the norm
  Dropout dropout;
};

struct TailBackwardArgs {
  Compute compute;
  std::int64_t hidden_size, num_tokens;
  Element element;
  const void* gradient;      // [T][C]
  const float* total;        // [T][C]
  const float* norm_weight;  // [C16]
  float eps;
  Dropout dropout;
  float* total_gradient;   // [T][C16]
  void* product_gradient;  // [T][C16] of compute
  float* partial;          // [chunks][3][C16]: last bias, norm weight, norm bias
};

struct FfnForwardArgs {
  Compute compute;
  Activation activation;
  TailArgs tail;
  std::int64_t neurons;  // of these rows
  Operand up, down;
  const float* up_bias;  // [I16]
  void* pre_activation;  // [T][up_stride] of compute
  std::int64_t up_stride;
};

struct FfnBackwardArgs {
  Compute compute;
  Activation activation;
  std::int64_t hidden_size;
  std::int64_t neurons;        // of these rows
  Operand down_by_neuron, up;  // outputs I, inputs C; outputs C, inputs I
  const void* pre_activation;  // [T][up_stride] of compute
  std::int64_t up_stride;
  const void* product_gradient;  // [T][C16] of compute
  const float* total_gradient;   // [T][C16]
  void* up_gradient;             // [T][inner_stride] of compute
  void* active;                  // the same
  std::int64_t inner_stride;     // a multiple of 16
  Element element;
  void* hidden_gradient;  // [T][C]
};

// outputs[t] = tokens[t] x weights + bias, for whole rows.
struct ProjectArgs {
  Compute compute;
  Matrix tokens;
  std::int64_t inputs, outputs;
  Operand weights;
  const float* bias;  // [outputs16], or nullptr
  void* to;           // [T][to_stride] of compute
  std::int64_t to_stride;
};

// The same product with what comes after it in a sublayer, or before it in its gradient.
struct ProjectTailArgs {
  Compute compute;
  Matrix tokens;
  std::int64_t inputs;
  Operand weights;
  TailArgs tail;
};
struct ProjectHiddenArgs {
  Compute compute;
  Matrix tokens;
  std::int64_t inputs, hidden_size;
  Operand weights;
  const float* total_gradient;  // [T][C16]
  Element element;
  void* hidden_gradient;  // [T][C]
};

struct CoreArgs {
  Compute compute;
  std::int64_t num_heads, head_dim, num_tokens;
  const std::int32_t* cu_seqlens;
  Dropout dropout;
  void* qkv;                     // [T][H][3][D] of compute
  void* context;                 // [T][H][D] of compute
  float* log_sum;                // [H][T], in powers of two
  const void* context_gradient;  // [T][H][D] of compute
  void* qkv_gradient;            // [T][H][3][D] of compute
};

// Tokens [first, last) at one width, with their other side of the product as panels.
struct TokenChunk {
  std::int64_t first, last, width;
  const std::byte* panels;
};

// gradient[r] = sum over tokens t of rows[t][r] * other[t].
struct WeightGradientArgs {
  Compute compute;
  const void* rows;  // [T][stride] of compute
  std::int64_t stride;
  const TokenChunk* chunks;
  std::int64_t num_chunks;
  std::int64_t columns;  // C
  Element element, bias_element;
  void* gradient;       // [R][C]
  void* bias_gradient;  // [R], or nullptr
};

struct GradientTable {
  // Panels of a row-major matrix. `_outputs`: rows are outputs, panels [first, last) of them.
  // `_inputs`: rows are inputs, steps [first, last) of them.
  void (*pack_outputs)(Compute, const Matrix&, std::int64_t outputs, std::int64_t inputs,
                       std::int64_t first, std::int64_t last, const Operand&);
  void (*pack_inputs)(Compute, const Matrix&, std::int64_t inputs, std::int64_t outputs,
                      std::int64_t first, std::int64_t last, const Operand&);
  // Rows [first, last), of one width.
  void (*ffn_forward)(const FfnForwardArgs&, std::int64_t first, std::int64_t last);
  void (*ffn_backward)(const FfnBackwardArgs&, std::int64_t first, std::int64_t last);
  void (*project)(const ProjectArgs&, std::int64_t first, std::int64_t last);
  void (*project_tail)(const ProjectTailArgs&, std::int64_t first, std::int64_t last);
  void (*project_hidden)(const ProjectHiddenArgs&, std::int64_t first, std::int64_t last);
  // One chunk of kNormChunk tokens.
  void (*tail_backward)(const TailBackwardArgs&, std::int64_t chunk);
  // One head of one sequence.
  void (*core_forward)(const CoreArgs&, std::int64_t sequence, std::int64_t head);
  void (*core_backward)(const CoreArgs&, std::int64_t sequence, std::int64_t head);
  // Rows [first, last) of the gradient, which the same chunks contribute to.
  void (*weight_gradient)(const WeightGradientArgs&, std::int64_t first, std::int64_t last);
};

}  // namespace dynabert
