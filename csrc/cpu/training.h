// What the training drivers of both sublayers share.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "cpu/gradient_table.h"
#include "cpu/work.h"

namespace dynabert {

// Kernels of the instruction set in force.
const GradientTable& active_gradients();

// Calls function(i) for i below count, each thread taking the next when it is free: pieces differ
// in size where widths do. No result depends on who ran what.
template <class Function>
void share_out(std::int64_t count, Function&& function) {
  std::atomic<std::int64_t> next{0};
  at::parallel_for(0, std::min<std::int64_t>(count, at::get_num_threads()), 1,
                   [&](std::int64_t, std::int64_t) {
                     for (std::int64_t i = next++; i < count; i = next++) function(i);
                   });
}

// The seed of a call's masks, as a tensor that its gradient gets back: the caller's, or one drawn
// from torch's generator where there is dropout.
at::Tensor mask_seed(const std::optional<std::int64_t>& seed, bool has_dropout);
Dropout dropout_of(double p, const at::Tensor& seed, bool is_drawn);

Matrix matrix_of(const char* who, const at::Tensor& rows);
at::ScalarType dtype_of(Compute compute);
Compute parse_training_compute(const char* who, c10::string_view name);

// The values in float32, zeros up to `size`.
const float* padded_floats(const char* who, const at::Tensor& values, std::int64_t size,
                           ScratchFrame& frame);

Operand pack_outputs(const GradientTable& table, Compute compute, const Matrix& matrix,
                     std::int64_t outputs, std::int64_t inputs, ScratchFrame& frame);
Operand pack_inputs(const GradientTable& table, Compute compute, const Matrix& matrix,
                    std::int64_t inputs, std::int64_t outputs, ScratchFrame& frame);

// Tokens in the blocks of the weight gradients, which do not depend on the number of threads;
// widths are multiplied with `rows_per_width`.
std::vector<TokenChunk> token_chunks(const std::vector<TokenBlock>& blocks,
                                     std::int64_t rows_per_width);
// The same with one side of the products packed.
std::vector<TokenChunk> packed_chunks(const GradientTable& table, Compute compute,
                                      std::vector<TokenChunk> chunks, const Matrix& tokens,
                                      std::int64_t columns, ScratchFrame& frame);

// The gradient of an elastic weight, [R][...] as `like`, and of its bias where one is given: zero
// beyond the widest prefix.
//   rows  [T][stride] of compute
at::Tensor weight_gradient(const GradientTable& table, const char* who, Compute compute,
                           const void* rows, std::int64_t stride,
                           const std::vector<TokenChunk>& chunks, const at::Tensor& like,
                           at::Tensor* bias_gradient);

// The gradient of a sublayer's tail, in scratch memory.
struct TailGradient {
  const float* total;   // [T][C16]
  const void* product;  // [T][C16] of compute
  at::Tensor bias, norm_weight, norm_bias;
};
TailGradient tail_gradient(const GradientTable& table, const char* who, Compute compute,
                           const at::Tensor& gradient, const at::Tensor& total,
                           const at::Tensor& bias, const at::Tensor& norm_weight,
                           const at::Tensor& norm_bias, double eps, const Dropout& dropout,
                           ScratchFrame& frame);

}  // namespace dynabert
