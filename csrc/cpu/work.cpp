#include "cpu/work.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "checks.h"

namespace dynabert {
namespace {

// A thread with fewer rows than this waits for memory: 24 rows give each weight read from DRAM as
// many products as the core can do meanwhile.
constexpr std::int64_t kFewRows = 24;
// Rows of a block: its tokens, sums and activations stay in a megabyte of L2 beside the panels.
constexpr std::int64_t kMostRows = 96;

}  // namespace

bool shares_weights(std::int64_t tokens) {
  const std::int64_t threads = at::get_num_threads();
  return threads > 1 && !at::in_parallel_region() && tokens < threads * kFewRows;
}

std::vector<TokenBlock> token_blocks(std::int64_t tokens, std::int64_t width,
                                     const std::int32_t* widths, const std::int32_t* cu_seqlens,
                                     std::int64_t batch_size) {
  std::vector<TokenBlock> segments;
  if (widths == nullptr) {
    segments.push_back({0, tokens, width});
  } else {
    for (std::int64_t b = 0; b < batch_size; ++b) {
      if (cu_seqlens[b] == cu_seqlens[b + 1]) continue;
      if (segments.empty() || segments.back().width != widths[b]) {
        segments.push_back({cu_seqlens[b], cu_seqlens[b], widths[b]});
      }
      segments.back().last = cu_seqlens[b + 1];
    }
  }
  const std::int64_t threads = at::get_num_threads();
  std::vector<TokenBlock> blocks;
  for (const TokenBlock& segment : segments) {
    const std::int64_t rows = segment.last - segment.first;
    // As many blocks for each thread, of nearly equal size.
    const std::int64_t count = std::min(rows, threads * ceil_div(rows, threads * kMostRows));
    for (std::int64_t i = 0; i < count; ++i) {
      blocks.push_back({segment.first + rows * i / count, segment.first + rows * (i + 1) / count,
                        segment.width});
    }
  }
  return blocks;
}

Compute parse_compute(const char* who, const std::string& name) {
  if (name == "float32") return Compute::kFloat32;
  if (name == "bfloat16") return Compute::kBFloat16;
  DYNABERT_CHECK_VALUE(name == "int8", who, "compute", "'" + name + "'",
                       "float32, bfloat16 or int8", "Other dtypes run on the reference backend");
  return Compute::kInt8;
}

Activation parse_activation(const char* who, const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  DYNABERT_CHECK_VALUE(name == "relu", who, "activation", "'" + name + "'",
                       "gelu, gelu_tanh or relu", "Other activations have no kernel");
  return Activation::kRelu;
}

Element element_of(const char* who, const at::Tensor& hidden) {
  if (hidden.scalar_type() == at::kFloat) return Element::kFloat32;
  DYNABERT_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16, who, "hidden.dtype",
                       hidden.scalar_type(), "float32 or bfloat16",
                       "Other dtypes run on the reference backend");
  return Element::kBFloat16;
}

void check_shape(const char* who, const char* name, const at::Tensor& tensor,
                 at::IntArrayRef shape) {
  bool same = tensor.dim() == static_cast<std::int64_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) {
    same = shape[i] == -1 || tensor.size(static_cast<std::int64_t>(i)) == shape[i];
  }
  DYNABERT_CHECK_VALUE(same, who, std::string(name) + ".shape", tensor.sizes(), shape,
                       "All tensors of a sublayer must agree");
  DYNABERT_CHECK_VALUE(tensor.device().is_cpu(), who, std::string(name) + ".device",
                       tensor.device(), "cpu", "Move all tensors to one device");
}

void check_offsets(const char* who, const at::Tensor& cu_seqlens, std::int64_t tokens) {
  check_shape(who, "cu_seqlens", cu_seqlens, {-1});
  DYNABERT_CHECK_VALUE(
      cu_seqlens.scalar_type() == at::kInt && cu_seqlens.is_contiguous() && cu_seqlens.numel() > 0,
      who, "cu_seqlens", cu_seqlens.toString(), "contiguous int32", "Use dynabert_kernels.varlen");
  const auto* offsets = cu_seqlens.const_data_ptr<std::int32_t>();
  const std::int64_t count = cu_seqlens.numel();
  DYNABERT_CHECK_VALUE(
      offsets[0] == 0 && offsets[count - 1] == tokens && std::is_sorted(offsets, offsets + count),
      who, "cu_seqlens", std::to_string(offsets[0]) + " to " + std::to_string(offsets[count - 1]),
      "offsets from 0 to " + std::to_string(tokens) + " that never fall",
      "Use dynabert_kernels.varlen");
}

void check_width(const char* who, const char* name, std::int64_t width, std::int64_t limit) {
  DYNABERT_CHECK_VALUE(width >= 1 && width <= limit, who, name, width,
                       "1 to " + std::to_string(limit), "The weights hold no more");
}

void check_widths(const char* who, const char* name, const at::Tensor& widths,
                  std::int64_t batch_size, std::int64_t limit) {
  check_shape(who, name, widths, {batch_size});
  DYNABERT_CHECK_VALUE(widths.scalar_type() == at::kInt && widths.is_contiguous(), who, name,
                       widths.toString(), "contiguous int32", "Use torch.tensor(..., dtype=int32)");
  const auto* values = widths.const_data_ptr<std::int32_t>();
  for (std::int64_t b = 0; b < batch_size; ++b) check_width(who, name, values[b], limit);
}

}  // namespace dynabert
