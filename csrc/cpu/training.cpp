#include "cpu/training.h"

#include <ATen/CPUGeneratorImpl.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <set>
#include <string>

#include "checks.h"
#include "cpu/isa.h"

namespace dynabert {

extern const GradientTable kScalarGradients;
#if defined(__x86_64__)
extern const GradientTable kAvx2Gradients;
extern const GradientTable kAvx512Gradients;
extern const GradientTable kAvx512VnniGradients;
extern const GradientTable kAvx512Bf16Gradients;
#endif

const GradientTable& active_gradients() {
#if defined(__x86_64__)
  const std::string name = active_table().name;
  if (name == "avx2") return kAvx2Gradients;
  if (name == "avx512") return kAvx512Gradients;
  if (name == "avx512_vnni") return kAvx512VnniGradients;
  if (name == "avx512_bf16") return kAvx512Bf16Gradients;
#endif
  return kScalarGradients;
}

namespace {

// Rows of a weight gradient that a thread sums at a time: with the staged tokens of a chunk they
// stay in a megabyte of L2.
constexpr std::int64_t kGradientBlock = 96;

std::int64_t bytes_of(Compute compute) { return 4 / per_unit(compute); }

}  // namespace

at::Tensor mask_seed(const std::optional<std::int64_t>& seed, bool has_dropout) {
  at::Tensor kept = at::zeros({1}, at::kLong);
  auto* value = kept.mutable_data_ptr<std::int64_t>();
  if (seed.has_value()) {
    *value = *seed;
  } else if (has_dropout) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    *value = static_cast<std::int64_t>(
        at::check_generator<at::CPUGeneratorImpl>(generator)->random64() >> 1);
  }
  return kept;
}

Dropout dropout_of(double p, const at::Tensor& seed, bool is_drawn) {
  Dropout dropout{p > 0, is_drawn, 0, 0, 0};
  dropout.seed = static_cast<std::uint64_t>(seed.const_data_ptr<std::int64_t>()[0]);
  if (is_drawn) {
    // 16 bits decide; the scale is that of the probability in effect.
    dropout.bound = static_cast<float>(std::min(std::round(p * 65536), 65535.0));
    dropout.scale = 65536.0f / (65536.0f - dropout.bound);
  } else {
    // Kept where the number is greater than p.
    dropout.bound = std::nextafter(static_cast<float>(p), std::numeric_limits<float>::infinity());
    dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  }
  return dropout;
}

Matrix matrix_of(const char* who, const at::Tensor& rows) {
  return {element_of(who, rows), rows.const_data_ptr(), rows.size(-1)};
}

at::ScalarType dtype_of(Compute compute) {
  return compute == Compute::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

Compute parse_training_compute(const char* who, c10::string_view name) {
  const Compute compute = parse_compute(who, std::string(name));
  DYNABERT_CHECK_VALUE(compute != Compute::kInt8, who, "compute", "'int8'", "float32 or bfloat16",
                       "Quantised weights have no gradients");
  return compute;
}

const float* padded_floats(const char* who, const at::Tensor& values, std::int64_t size,
                           ScratchFrame& frame) {
  auto* to = static_cast<float*>(frame.take(size * sizeof(float)));
  const at::Tensor from = values.contiguous();
  const std::int64_t count = from.numel();
  if (element_of(who, from) == Element::kFloat32) {
    std::memcpy(to, from.const_data_ptr(), count * sizeof(float));
  } else {
    std::copy_n(from.const_data_ptr<at::BFloat16>(), count, to);
  }
  std::fill(to + count, to + size, 0.0f);
  return to;
}

Operand pack_outputs(const GradientTable& table, Compute compute, const Matrix& matrix,
                     std::int64_t outputs, std::int64_t inputs, ScratchFrame& frame) {
  const std::int64_t panels = ceil_div(outputs, kLanes);
  const std::int64_t bytes = ceil_div(inputs, per_unit(compute)) * kStepBytes;
  const Operand operand{static_cast<std::byte*>(frame.take(panels * bytes)), bytes};
  at::parallel_for(0, panels, 1, [&](std::int64_t first, std::int64_t last) {
    table.pack_outputs(compute, matrix, outputs, inputs, first, last, operand);
  });
  return operand;
}

Operand pack_inputs(const GradientTable& table, Compute compute, const Matrix& matrix,
                    std::int64_t inputs, std::int64_t outputs, ScratchFrame& frame) {
  const std::int64_t steps = ceil_div(inputs, per_unit(compute)), bytes = steps * kStepBytes;
  const Operand operand{static_cast<std::byte*>(frame.take(ceil_div(outputs, kLanes) * bytes)),
                        bytes};
  at::parallel_for(0, steps, kLanes, [&](std::int64_t first, std::int64_t last) {
    table.pack_inputs(compute, matrix, inputs, outputs, first, last, operand);
  });
  return operand;
}

std::vector<TokenChunk> token_chunks(const std::vector<TokenBlock>& blocks,
                                     std::int64_t rows_per_width) {
  std::vector<TokenChunk> chunks;
  for (std::size_t i = 0; i < blocks.size();) {
    const std::int64_t begin = blocks[i].first, width = blocks[i].width;
    std::int64_t end = begin;
    for (; i < blocks.size() && blocks[i].width == width; ++i) end = blocks[i].last;
    for (std::int64_t first = begin; first < end; first += kTokenChunk) {
      chunks.push_back(
          {first, std::min(first + kTokenChunk, end), width * rows_per_width, nullptr});
    }
  }
  return chunks;
}

std::vector<TokenChunk> packed_chunks(const GradientTable& table, Compute compute,
                                      std::vector<TokenChunk> chunks, const Matrix& tokens,
                                      std::int64_t columns, ScratchFrame& frame) {
  const std::int64_t panels = ceil_div(columns, kLanes), unit = per_unit(compute);
  std::vector<Operand> operands;
  for (TokenChunk& chunk : chunks) {
    const std::int64_t bytes = ceil_div(chunk.last - chunk.first, unit) * kStepBytes;
    operands.push_back({static_cast<std::byte*>(frame.take(panels * bytes)), bytes});
    chunk.panels = operands.back().data;
  }
  const std::int64_t size = tokens.element == Element::kFloat32 ? 4 : 2;
  share_out(static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
    const TokenChunk& chunk = chunks[i];
    const std::int64_t count = chunk.last - chunk.first;
    const Matrix part{
        tokens.element,
        static_cast<const std::byte*>(tokens.data) + chunk.first * tokens.stride * size,
        tokens.stride};
    table.pack_inputs(compute, part, count, columns, 0, ceil_div(count, unit), operands[i]);
  });
  return chunks;
}

at::Tensor weight_gradient(const GradientTable& table, const char* who, Compute compute,
                           const void* rows, std::int64_t stride,
                           const std::vector<TokenChunk>& chunks, const at::Tensor& like,
                           at::Tensor* bias_gradient) {
  at::Tensor gradient = at::empty(like.sizes(), like.options());
  const std::int64_t columns = like.size(-1), limit = like.numel() / columns;
  const WeightGradientArgs args{
      compute,
      rows,
      stride,
      chunks.data(),
      static_cast<std::int64_t>(chunks.size()),
      columns,
      element_of(who, gradient),
      bias_gradient == nullptr ? Element::kFloat32 : element_of(who, *bias_gradient),
      gradient.mutable_data_ptr(),
      bias_gradient == nullptr ? nullptr : bias_gradient->mutable_data_ptr()};
  // The same chunks contribute to every row between two widths.
  std::set<std::int64_t> widths;
  for (const TokenChunk& chunk : chunks) widths.insert(chunk.width);
  std::vector<std::pair<std::int64_t, std::int64_t>> blocks;
  std::int64_t begin = 0;
  for (const std::int64_t width : widths) {
    const std::int64_t size = width - begin, count = ceil_div(size, kGradientBlock);
    for (std::int64_t i = 0; i < count; ++i) {
      blocks.emplace_back(begin + size * i / count, begin + size * (i + 1) / count);
    }
    begin = width;
  }
  share_out(static_cast<std::int64_t>(blocks.size()), [&](std::int64_t i) {
    table.weight_gradient(args, blocks[i].first, blocks[i].second);
  });
  const auto zero_from = [&](at::Tensor& tensor, std::int64_t at) {
    const std::size_t size = tensor.element_size();
    std::memset(static_cast<std::byte*>(tensor.mutable_data_ptr()) + at * size, 0,
                (tensor.numel() - at) * size);
  };
  if (begin < limit) {
    zero_from(gradient, begin * columns);
    if (bias_gradient != nullptr) zero_from(*bias_gradient, begin);
  }
  return gradient;
}

TailGradient tail_gradient(const GradientTable& table, const char* who, Compute compute,
                           const at::Tensor& gradient, const at::Tensor& total,
                           const at::Tensor& bias, const at::Tensor& norm_weight,
                           const at::Tensor& norm_bias, double eps, const Dropout& dropout,
                           ScratchFrame& frame) {
  const std::int64_t tokens = total.size(0), size = total.size(1), c16 = round_up(size, kLanes);
  const std::int64_t chunks = ceil_div(tokens, kNormChunk);
  auto* total_gradient = static_cast<float*>(frame.take(tokens * c16 * sizeof(float)));
  void* product_gradient = frame.take(tokens * c16 * bytes_of(compute));
  TailGradient result{total_gradient, product_gradient, at::empty(bias.sizes(), bias.options()),
                      at::empty(norm_weight.sizes(), norm_weight.options()),
                      at::empty(norm_bias.sizes(), norm_bias.options())};
  ScratchFrame partial_frame;
  auto* partial = static_cast<float*>(partial_frame.take(chunks * 3 * c16 * sizeof(float)));
  const TailBackwardArgs args{compute,
                              size,
                              tokens,
                              element_of(who, gradient),
                              gradient.const_data_ptr(),
                              total.const_data_ptr<float>(),
                              padded_floats(who, norm_weight, c16, partial_frame),
                              static_cast<float>(eps),
                              dropout,
                              total_gradient,
                              product_gradient,
                              partial};
  at::parallel_for(0, chunks, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t chunk = first; chunk < last; ++chunk) table.tail_backward(args, chunk);
  });
  auto* sums = static_cast<float*>(partial_frame.take(c16 * sizeof(float)));
  at::Tensor* parts[] = {&result.bias, &result.norm_weight, &result.norm_bias};
  for (std::int64_t part = 0; part < 3; ++part) {
    std::fill_n(sums, c16, 0.0f);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* from = partial + (chunk * 3 + part) * c16;
      for (std::int64_t c = 0; c < size; ++c) sums[c] += from[c];
    }
    if (parts[part]->scalar_type() == at::kFloat) {
      std::copy_n(sums, size, parts[part]->mutable_data_ptr<float>());
    } else {
      std::copy_n(sums, size, parts[part]->mutable_data_ptr<at::BFloat16>());
    }
  }
  return result;
}

}  // namespace dynabert
