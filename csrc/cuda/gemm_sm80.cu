// The launchers of gemm_sm80.h: arguments, and the choice of the element type.

#include "gemm_sm80.h"
#include "gemm_sm80_launch.h"

namespace dynabert {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

bool is_valid(const GemmSm80& args) {
  if (args.tokens < 0 || args.hidden_size < 8 || args.hidden_size % 8 != 0) return false;
  if (args.full_width < 1 || args.width.unit < 1) return false;
  if (args.x_stride % 8 != 0 || args.out_stride % 8 != 0) return false;
  if (!is_aligned(args.x) || !is_aligned(args.weight) || !is_aligned(args.out)) return false;
  if (args.tiles != nullptr) {
    return args.num_tiles >= 0 && (args.tile_rows == 64 || args.tile_rows == 128);
  }
  if (args.num_tiles != 0 || args.tile_rows != 0) return false;
  if (args.width.device_count != nullptr) return true;
  return args.width.count >= 0 && args.width.count <= args.full_width / args.width.unit;
}

bool has_work(const GemmSm80& args) {
  return args.tokens > 0 && (args.tiles == nullptr || args.num_tiles > 0);
}

}  // namespace

cudaError_t gemm_rows_sm80(const GemmSm80& args, cudaStream_t stream) {
  if (!is_valid(args)) return cudaErrorInvalidValue;
  if (!has_work(args)) return cudaSuccess;
  switch (args.type) {
    case ElementType::kBfloat16:
      return gemm_rows_sm80_bf16(args, stream);
    case ElementType::kFloat16:
      return gemm_rows_sm80_fp16(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t gemm_columns_sm80(const GemmSm80& args, cudaStream_t stream) {
  if (!is_valid(args) || args.activation != Activation::kNone) return cudaErrorInvalidValue;
  if (!has_work(args)) return cudaSuccess;
  switch (args.type) {
    case ElementType::kBfloat16:
      return gemm_columns_sm80_bf16(args, stream);
    case ElementType::kFloat16:
      return gemm_columns_sm80_fp16(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dynabert
