// The feed-forward sublayer of ffn_cuda.h: which kernels it is made of, and their memory.

#include "../cuda/gemm_sm80.h"
#include "../cuda/gemm_sm90.h"
#include "../cuda/launch.cuh"
#include "../cuda/layer_norm.h"
#include "../cuda/row_tiles.h"
#include "ffn_cuda.h"

namespace dynabert {
namespace {

bool is_mixed(const FfnCall& call) { return call.neurons.num_each > 1; }

// On Hopper the products may run on its own units, which take one width a call.
bool runs_on_sm90(const FfnCall& call) {
  return compute_capability() == 90 && call.compute == ElementType::kBfloat16 &&
         call.hidden_size % 64 == 0 && !is_mixed(call);
}

bool fuses_norm(const FfnCall& call) {
  return runs_on_sm90(call) && call.hidden_size == kFusedNormHiddenSize &&
         call.hidden_type == ElementType::kBfloat16 && call.norm_type == ElementType::kBfloat16 &&
         call.norm_workspace != nullptr;
}

// Where things lie in the workspace, in bytes. Rows of neurons begin on lines of 128 bytes.
struct Workspace {
  std::int64_t stride;        // of the neurons, in elements
  std::size_t neurons = 0;    // [T, stride]
  std::size_t projected = 0;  // [T, C]
  std::size_t tiles = 0;      // [max_row_tiles(...)]
  std::size_t bytes = 0;

  explicit Workspace(const FfnCall& call) {
    const auto take = [this](std::size_t size) {
      const std::size_t begin = bytes;
      bytes += (size + 255) / 256 * 256;
      return begin;
    };
    const std::size_t row = static_cast<std::size_t>(call.tokens) * 2;
    stride = (std::int64_t{call.neurons.limit} + 63) / 64 * 64;
    neurons = take(row * stride);
    projected = take(row * call.hidden_size);
    if (is_mixed(call) && call.tokens > 0) {
      const std::int32_t tile_rows = row_tile_rows(call.tokens, call.batch);
      tiles = take(sizeof(RowTile) * max_row_tiles(call.tokens, call.batch, tile_rows));
    }
  }
};

// The weights end, for a call, with the most neurons that it may use.
PrefixWidth prefix_width(const FfnCall& call) {
  return {call.neurons.limit, is_mixed(call) ? nullptr : call.neurons.each, 1};
}

cudaError_t forward_sm90(const FfnCall& call, const Workspace& workspace, void* neurons,
                         void* projected, cudaStream_t stream) {
  GemmRowsSm90 up = {};
  up.x = call.x;
  up.weight = call.up_weight;
  up.bias = call.up_bias;
  up.out = neurons;
  up.x_stride = call.x_stride;
  up.out_stride = workspace.stride;
  up.tokens = call.tokens;
  up.hidden_size = call.hidden_size;
  up.full_width = call.neurons.limit;
  up.width = prefix_width(call);
  up.activation = call.activation;
  if (const cudaError_t error = gemm_rows_sm90(up, stream)) return error;

  GemmColumnsSm90 down = {};
  down.x = neurons;
  down.weight = call.down_weight;
  down.bias = call.down_bias;
  down.out = projected;
  down.x_stride = workspace.stride;
  down.residual_stride = down.out_stride = call.hidden_size;
  down.tokens = call.tokens;
  down.hidden_size = call.hidden_size;
  down.full_width = call.neurons.limit;
  down.width = prefix_width(call);
  if (fuses_norm(call)) {
    down.residual = call.residual;
    down.residual_stride = call.residual_stride;
    down.norm_weight = call.norm_weight;
    down.norm_bias = call.norm_bias;
    down.norm_workspace = call.norm_workspace;
    down.norm_eps = call.norm_eps;
    down.out = call.out;
  }
  return gemm_columns_sm90(down, stream);
}

cudaError_t forward_sm80(const FfnCall& call, const Workspace& workspace, void* neurons,
                         void* projected, RowTile* tiles, cudaStream_t stream) {
  GemmSm80 up = {};
  up.type = call.compute;
  up.activation = call.activation;
  up.x = call.x;
  up.weight = call.up_weight;
  up.bias = call.up_bias;
  up.out = neurons;
  up.x_stride = call.x_stride;
  up.out_stride = workspace.stride;
  up.tokens = call.tokens;
  up.hidden_size = call.hidden_size;
  up.full_width = call.neurons.limit;
  up.width = prefix_width(call);
  if (is_mixed(call)) {
    up.tile_rows = row_tile_rows(call.tokens, call.batch);
    up.num_tiles = max_row_tiles(call.tokens, call.batch, up.tile_rows);
    up.tiles = tiles;
    if (const cudaError_t error =
            build_row_tiles(call.cu_seqlens, call.batch, call.neurons.each, call.tokens,
                            call.neurons.limit, up.tile_rows, tiles, stream)) {
      return error;
    }
  }
  if (const cudaError_t error = gemm_rows_sm80(up, stream)) return error;

  GemmSm80 down = up;
  down.activation = Activation::kNone;
  down.x = neurons;
  down.weight = call.down_weight;
  down.bias = call.down_bias;
  down.out = projected;
  down.x_stride = workspace.stride;
  down.out_stride = call.hidden_size;
  return gemm_columns_sm80(down, stream);
}

}  // namespace

const char* ffn_why_not(const FfnCall& call) {
  if (compute_capability() < 80) return "the device has no compute capability of 8.0 or more";
  if (call.compute != ElementType::kBfloat16 && call.compute != ElementType::kFloat16) {
    return "products are of bfloat16 or float16";
  }
  if (call.hidden_size < 8 || call.hidden_size % 8 != 0) return "hidden_size is no multiple of 8";
  if (call.hidden_size > kMaxNormHiddenSize) return "hidden_size is above 8192";
  if (call.neurons.limit < 1 || call.neurons.limit > call.full_width) {
    return "neurons are not between one and those of the weights";
  }
  const std::int32_t num_each = call.neurons.num_each;
  if (num_each != 0 && num_each != 1 && num_each != call.batch) {
    return "widths are neither one nor one for each sequence";
  }
  return nullptr;
}

std::size_t ffn_workspace_bytes(const FfnCall& call) { return Workspace(call).bytes; }

cudaError_t ffn_forward(const FfnCall& call, cudaStream_t stream) {
  if (ffn_why_not(call) != nullptr) return cudaErrorNotSupported;
  if (call.tokens == 0) return cudaSuccess;
  const Workspace workspace(call);
  auto* const memory = static_cast<unsigned char*>(call.workspace);
  void* const neurons = memory + workspace.neurons;
  void* const projected = memory + workspace.projected;
  auto* const tiles = reinterpret_cast<RowTile*>(memory + workspace.tiles);
  if (const cudaError_t error =
          runs_on_sm90(call) ? forward_sm90(call, workspace, neurons, projected, stream)
                             : forward_sm80(call, workspace, neurons, projected, tiles, stream)) {
    return error;
  }
  if (fuses_norm(call)) return cudaSuccess;

  LayerNormCall norm = {};
  norm.projected_type = call.compute;
  norm.hidden_type = call.hidden_type;
  norm.norm_type = call.norm_type;
  norm.projected = projected;
  norm.residual = call.residual;
  norm.norm_weight = call.norm_weight;
  norm.norm_bias = call.norm_bias;
  norm.out = call.out;
  norm.projected_stride = norm.out_stride = call.hidden_size;
  norm.residual_stride = call.residual_stride;
  norm.tokens = call.tokens;
  norm.hidden_size = call.hidden_size;
  norm.norm_eps = call.norm_eps;
  return layer_norm(norm, stream);
}

}  // namespace dynabert
