// Launchers of gemm_sm90.h: tensor maps, shared memory, clusters.

#include <cudaTypedefs.h>

#include <atomic>

#include "gemm_sm90.cuh"
#include "gemm_sm90.h"
#include "launch.cuh"

namespace dynabert {
namespace {

constexpr int kMaxDevices = 64;

// The driver's encoder, found through the runtime so that nothing links against libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  constexpr char kName[] = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// A bf16 tensor cut into boxes whose rows are 128 bytes, swizzled. `dims` and `box` are innermost
// first; strides in bytes, of the dimensions after the first.
template <int kRank>
cudaError_t encode(CUtensorMap* map, const void* data, const cuuint64_t (&dims)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const cuuint32_t unit[3] = {1, 1, 1};
  const CUresult result =
      encoder(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), dims, strides,
              box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t encode_rows(CUtensorMap* map, const void* data, std::int64_t rows, std::int64_t columns,
                        std::int64_t stride, int box_rows) {
  return encode<2>(map, data, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                   {static_cast<cuuint64_t>(stride) * 2}, {64, static_cast<cuuint32_t>(box_rows)});
}

// [rows, columns] seen as [columns / 64, rows, 64]: a box is whole panels of 64 columns.
cudaError_t encode_panels(CUtensorMap* map, const void* data, std::int64_t rows,
                          std::int64_t columns, int box_rows, int box_panels) {
  return encode<3>(map, data,
                   {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 64)},
                   {static_cast<cuuint64_t>(columns) * 2, 128},
                   {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_panels)});
}

template <class Traits>
LaunchShape launch_shape(int blocks) {
  return {.grid = dim3(blocks),
          .block = dim3(kGemmThreads),
          .shared_bytes = Traits::kSharedBytes,
          .cluster = Traits::kCluster,
          // With LayerNorm blocks wait for each other, so all of them must be resident.
          .cooperative = Traits::kNorm,
          .programmatic = !Traits::kNorm};
}

// How many groups of blocks the device keeps resident; asked once per kernel and device.
template <class Traits>
cudaError_t resident_groups(int* groups) {
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  *groups = known[device].load(std::memory_order_acquire);
  if (*groups > 0) return cudaSuccess;

  LaunchShape shape = launch_shape<Traits>(multiprocessors() / Traits::kCluster * Traits::kCluster);
  shape.cooperative = shape.programmatic = false;
  int clusters = 0;
  if (const cudaError_t error = max_active_clusters(&clusters, gemm_sm90_kernel<Traits>, shape)) {
    return error;
  }
  *groups = clusters * Traits::kCluster / Traits::kGroup;
  if (*groups < 1) return cudaErrorLaunchOutOfResources;
  known[device].store(*groups, std::memory_order_release);
  return cudaSuccess;
}

struct TensorMaps {
  CUtensorMap a, b, out, residual;
};

template <class Traits>
cudaError_t launch(const TensorMaps& maps, const GemmArguments& args, cudaStream_t stream) {
  int groups = 0;
  if (const cudaError_t error = resident_groups<Traits>(&groups)) return error;
  // A width in device memory is unknown here; the largest decides how many groups can have work.
  const std::int32_t columns =
      Traits::kForm == WeightForm::kRows ? args.full_width : args.hidden_size;
  const TileSchedule schedule(Traits::kTile, args.tokens, columns);
  if (schedule.count < groups) groups = schedule.count;

  return launch_kernel(gemm_sm90_kernel<Traits>, launch_shape<Traits>(groups * Traits::kGroup),
                       stream, maps.a, maps.b, maps.out, maps.residual, args);
}

// Where a tensor ends for the copy engine, along the width: it reads zeros past it and writes
// nothing past the 16 bytes that the end is in. A width in device memory is not known here.
std::int64_t width_bound(const PrefixWidth& width, std::int64_t otherwise) {
  return width.device_count == nullptr ? width.rows() : otherwise;
}

bool is_valid(std::int32_t tokens, std::int32_t hidden_size, std::int32_t full_width,
              const PrefixWidth& width) {
  if (tokens < 0 || hidden_size < 64 || hidden_size % 64 != 0 || full_width < 1) return false;
  if (width.device_count != nullptr) return width.unit > 0;
  return width.rows() > 0 && width.rows() <= full_width;
}

template <class Traits>
cudaError_t launch_rows(const GemmRowsSm90& args, cudaStream_t stream) {
  const GemmArguments kernel_args = {args.width,
                                     args.tokens,
                                     args.hidden_size,
                                     args.full_width,
                                     static_cast<const __nv_bfloat16*>(args.bias),
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     0.0f};
  TensorMaps maps = {};
  if (const cudaError_t error =
          encode_rows(&maps.a, args.x, args.tokens, args.hidden_size, args.x_stride, kTileRows)) {
    return error;
  }
  if (const cudaError_t error = encode_rows(&maps.b, args.weight, args.full_width, args.hidden_size,
                                            args.hidden_size, Traits::kRowsPerLoadB)) {
    return error;
  }
  if (const cudaError_t error =
          encode_rows(&maps.out, args.out, args.tokens, width_bound(args.width, args.out_stride),
                      args.out_stride, kTileRows)) {
    return error;
  }
  return launch<Traits>(maps, kernel_args, stream);
}

template <class Traits>
cudaError_t launch_columns(const GemmColumnsSm90& args, cudaStream_t stream) {
  const GemmArguments kernel_args = {args.width,
                                     args.tokens,
                                     args.hidden_size,
                                     args.full_width,
                                     static_cast<const __nv_bfloat16*>(args.bias),
                                     static_cast<const __nv_bfloat16*>(args.norm_weight),
                                     static_cast<const __nv_bfloat16*>(args.norm_bias),
                                     static_cast<unsigned long long*>(args.norm_workspace),
                                     args.norm_eps};
  TensorMaps maps = {};
  if (const cudaError_t error =
          encode_rows(&maps.a, args.x, args.tokens, width_bound(args.width, args.x_stride),
                      args.x_stride, kTileRows)) {
    return error;
  }
  if (const cudaError_t error =
          encode_panels(&maps.b, args.weight, width_bound(args.width, args.full_width),
                        args.hidden_size, Traits::kRowsPerLoadB, kTileColumns / 64)) {
    return error;
  }
  if constexpr (Traits::kResidual) {
    if (const cudaError_t error = encode_rows(&maps.residual, args.residual, args.tokens,
                                              args.hidden_size, args.residual_stride, kTileRows)) {
      return error;
    }
  }
  if (const cudaError_t error = encode_rows(&maps.out, args.out, args.tokens, args.hidden_size,
                                            args.out_stride, kTileRows)) {
    return error;
  }
  return launch<Traits>(maps, kernel_args, stream);
}

template <Activation kActivation>
using Rows = GemmTraits<WeightForm::kRows, Epilogue::kBias, kActivation>;
using Columns = GemmTraits<WeightForm::kColumns, Epilogue::kBias>;
using ColumnsResidual = GemmTraits<WeightForm::kColumns, Epilogue::kResidual>;
using ColumnsNorm = GemmTraits<WeightForm::kColumns, Epilogue::kResidualNorm>;
static_assert(kFusedNormHiddenSize == kNormBlocks * kTileColumns);

}  // namespace

cudaError_t gemm_rows_sm90(const GemmRowsSm90& args, cudaStream_t stream) {
  if (!is_valid(args.tokens, args.hidden_size, args.full_width, args.width)) {
    return cudaErrorInvalidValue;
  }
  if (args.tokens == 0) return cudaSuccess;
  switch (args.activation) {
    case Activation::kNone:
      return launch_rows<Rows<Activation::kNone>>(args, stream);
    case Activation::kGelu:
      return launch_rows<Rows<Activation::kGelu>>(args, stream);
    case Activation::kGeluTanh:
      return launch_rows<Rows<Activation::kGeluTanh>>(args, stream);
    case Activation::kRelu:
      return launch_rows<Rows<Activation::kRelu>>(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t gemm_norm_workspace_bytes(std::size_t* bytes) {
  int groups = 0;
  if (const cudaError_t error = resident_groups<ColumnsNorm>(&groups)) return error;
  constexpr std::size_t kWords = 2 * kNormBlocks * kTileRows;  // of a block
  *bytes = groups * kNormBlocks * kWords * sizeof(unsigned long long);
  return cudaSuccess;
}

cudaError_t gemm_columns_sm90(const GemmColumnsSm90& args, cudaStream_t stream) {
  if (!is_valid(args.tokens, args.hidden_size, args.full_width, args.width)) {
    return cudaErrorInvalidValue;
  }
  if ((args.norm_weight == nullptr) != (args.norm_bias == nullptr)) return cudaErrorInvalidValue;
  const bool norm = args.norm_weight != nullptr;
  if (norm && args.residual == nullptr) return cudaErrorInvalidValue;
  if (norm && args.hidden_size != kFusedNormHiddenSize) return cudaErrorInvalidValue;
  if (norm && args.norm_workspace == nullptr) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  if (norm) return launch_columns<ColumnsNorm>(args, stream);
  return args.residual != nullptr ? launch_columns<ColumnsResidual>(args, stream)
                                  : launch_columns<Columns>(args, stream);
}

}  // namespace dynabert
