// The attention sublayer of attention_cuda.h: which kernels it is made of, and their memory.

#include <algorithm>

#include "../cuda/gemm_sm80.h"
#include "../cuda/gemm_sm90.h"
#include "../cuda/launch.cuh"
#include "../cuda/layer_norm.h"
#include "../cuda/row_tiles.h"
#include "attention_core.h"
#include "attention_cuda.h"

namespace dynabert {
namespace {

bool is_mixed(const AttentionCall& call) { return call.heads.num_each > 1; }

// On Hopper the products may run on its own units, which take one width a call.
bool runs_on_sm90(const AttentionCall& call) {
  return compute_capability() == 90 && call.compute == ElementType::kBfloat16 &&
         call.hidden_size % 64 == 0 && !is_mixed(call);
}

bool fuses_norm(const AttentionCall& call) {
  return runs_on_sm90(call) && call.hidden_size == kFusedNormHiddenSize &&
         call.hidden_type == ElementType::kBfloat16 && call.norm_type == ElementType::kBfloat16 &&
         call.norm_workspace != nullptr;
}

// Where things lie in the workspace, in bytes. The projection takes the place of Q, K and V, which
// nobody reads any more, so that it finds their memory in the cache.
struct Workspace {
  std::size_t qkv = 0;  // [T, limit, 3, D], then [T, C]
  std::size_t context;  // [T, limit, D]
  std::size_t tiles;    // [max_row_tiles(...)]
  std::size_t bytes;

  explicit Workspace(const AttentionCall& call) {
    const auto aligned = [](std::size_t size) { return (size + 255) / 256 * 256; };
    const std::size_t row = static_cast<std::size_t>(call.tokens) * 2;
    const std::size_t width = static_cast<std::size_t>(call.heads.limit) * call.head_dim;
    context = aligned(row * std::max(3 * width, static_cast<std::size_t>(call.hidden_size)));
    tiles = context + aligned(row * width);
    bytes = tiles;
    if (is_mixed(call) && call.tokens > 0) {
      bytes += aligned(sizeof(RowTile) * max_row_tiles(call.tokens, call.batch,
                                                       row_tile_rows(call.tokens, call.batch)));
    }
  }
};

// Of a product whose weight has `rows` rows a head.
PrefixWidth prefix_width(const AttentionCall& call, std::int32_t rows) {
  return {call.heads.limit, is_mixed(call) ? nullptr : call.heads.each, rows};
}

cudaError_t project_qkv(const AttentionCall& call, void* qkv, const GemmSm80& shared,
                        cudaStream_t stream) {
  const std::int32_t unit = 3 * call.head_dim, width = call.heads.limit * unit;
  if (runs_on_sm90(call)) {
    return gemm_rows_sm90(
        {call.x, call.qkv_weight, call.qkv_bias, qkv, call.x_stride, width, call.tokens,
         call.hidden_size, width, prefix_width(call, unit), Activation::kNone},
        stream);
  }
  GemmSm80 product = shared;
  product.x = call.x;
  product.weight = call.qkv_weight;
  product.bias = call.qkv_bias;
  product.out = qkv;
  product.x_stride = call.x_stride;
  product.out_stride = width;
  product.full_width = width;
  product.width = prefix_width(call, unit);
  return gemm_rows_sm80(product, stream);
}

// With residual and LayerNorm where they fit into the product, else before them.
cudaError_t project_out(const AttentionCall& call, const void* context, void* projected,
                        const GemmSm80& shared, cudaStream_t stream) {
  const std::int32_t unit = call.head_dim, width = call.heads.limit * unit;
  if (runs_on_sm90(call)) {
    const bool fused = fuses_norm(call);
    return gemm_columns_sm90(
        {context, call.out_weight, call.out_bias, fused ? call.residual : nullptr,
         fused ? call.norm_weight : nullptr, fused ? call.norm_bias : nullptr,
         fused ? call.norm_workspace : nullptr, fused ? call.out : projected, width,
         fused ? call.residual_stride : call.hidden_size, call.hidden_size, call.tokens,
         call.hidden_size, width, prefix_width(call, unit), call.norm_eps},
        stream);
  }
  GemmSm80 product = shared;
  product.x = context;
  product.weight = call.out_weight;
  product.bias = call.out_bias;
  product.out = projected;
  product.x_stride = width;
  product.out_stride = call.hidden_size;
  product.full_width = width;
  product.width = prefix_width(call, unit);
  return gemm_columns_sm80(product, stream);
}

}  // namespace

const char* attention_why_not(const AttentionCall& call) {
  if (compute_capability() < 80) return "the device has no compute capability of 8.0 or more";
  if (call.compute != ElementType::kBfloat16 && call.compute != ElementType::kFloat16) {
    return "products are of bfloat16 or float16";
  }
  if (!attention_core_has(call.head_dim)) return "head_dim is not 32, 64, 80 or 128";
  if (call.hidden_size < 8 || call.hidden_size % 8 != 0) return "hidden_size is no multiple of 8";
  if (call.hidden_size > kMaxNormHiddenSize) return "hidden_size is above 8192";
  if (call.heads.limit < 1 || call.heads.limit > call.full_width) {
    return "heads are not between one and those of the weights";
  }
  if (call.heads.num_each != 0 && call.heads.num_each != 1 && call.heads.num_each != call.batch) {
    return "widths are neither one nor one for each sequence";
  }
  return nullptr;
}

std::size_t attention_workspace_bytes(const AttentionCall& call) { return Workspace(call).bytes; }

cudaError_t attention_forward(const AttentionCall& call, cudaStream_t stream) {
  if (attention_why_not(call) != nullptr) return cudaErrorNotSupported;
  if (call.tokens == 0 || call.batch == 0) return cudaSuccess;
  const Workspace workspace(call);
  auto* const memory = static_cast<unsigned char*>(call.workspace);
  void* const qkv = memory + workspace.qkv;
  void* const context = memory + workspace.context;
  void* const projected = qkv;

  // What both products have in common.
  GemmSm80 shared = {};
  shared.type = call.compute;
  shared.tokens = call.tokens;
  shared.hidden_size = call.hidden_size;
  if (is_mixed(call)) {
    auto* const tiles = reinterpret_cast<RowTile*>(memory + workspace.tiles);
    shared.tile_rows = row_tile_rows(call.tokens, call.batch);
    shared.num_tiles = max_row_tiles(call.tokens, call.batch, shared.tile_rows);
    shared.tiles = tiles;
    if (const cudaError_t error =
            build_row_tiles(call.cu_seqlens, call.batch, call.heads.each, call.tokens,
                            call.heads.limit, shared.tile_rows, tiles, stream)) {
      return error;
    }
  }

  if (const cudaError_t error = project_qkv(call, qkv, shared, stream)) return error;
  const std::int64_t width = static_cast<std::int64_t>(call.heads.limit) * call.head_dim;
  if (const cudaError_t error =
          attention_core({call.compute, qkv, context, 3 * width, width, call.cu_seqlens, call.batch,
                          call.tokens, call.max_seqlen, call.head_dim, call.heads},
                         stream)) {
    return error;
  }
  if (const cudaError_t error = project_out(call, context, projected, shared, stream)) return error;
  if (fuses_norm(call)) return cudaSuccess;
  return layer_norm(
      {call.compute, call.hidden_type, call.norm_type, projected, call.residual, call.norm_weight,
       call.norm_bias, call.out, call.hidden_size, call.residual_stride, call.hidden_size,
       call.tokens, call.hidden_size, call.norm_eps},
      stream);
}

}  // namespace dynabert
