// Launchers of gemm_sm90.h: tensor maps, shared memory, clusters.

#include <cudaTypedefs.h>

#include <atomic>

#include "gemm_sm90.cuh"
#include "gemm_sm90.h"

namespace dynabert {
namespace {

constexpr int kMaxDevices = 64;

// The driver's encoder, found through the runtime so that nothing links against libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
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

// How many groups of blocks the device keeps resident; also raises the kernel's shared-memory
// limit. Asked once per kernel and device.
template <class Traits>
cudaError_t resident_groups(int* groups) {
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  *groups = known[device].load(std::memory_order_acquire);
  if (*groups > 0) return cudaSuccess;

  const auto kernel = gemm_sm90_kernel<Traits>;
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSharedBytes)) {
    return error;
  }
  int multiprocessors = 0;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
    return error;
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Traits::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(multiprocessors / Traits::kCluster * Traits::kCluster);
  config.blockDim = dim3(kGemmThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) {
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

  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {Traits::kCluster, 1, 1};
  if constexpr (Traits::kNorm) {
    // Blocks wait for each other, so all of them must be resident.
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
  } else {
    // Blocks may start, up to griddepcontrol.wait, before the previous kernel has ended.
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(groups * Traits::kGroup);
  config.blockDim = dim3(kGemmThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, gemm_sm90_kernel<Traits>, maps.a, maps.b, maps.out,
                            maps.residual, args);
}

bool is_valid(std::int32_t tokens, std::int32_t hidden_size, std::int32_t full_width,
              const PrefixWidth& width) {
  if (tokens < 0 || hidden_size < 64 || hidden_size % 64 != 0 || full_width < 64) return false;
  if (width.device_count != nullptr) return width.unit > 0;
  return width.rows() > 0 && width.rows() % 64 == 0 && width.rows() <= full_width;
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
  if (const cudaError_t error = encode_rows(&maps.out, args.out, args.tokens, args.out_stride,
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
          encode_rows(&maps.a, args.x, args.tokens, args.x_stride, args.x_stride, kTileRows)) {
    return error;
  }
  if (const cudaError_t error =
          encode_panels(&maps.b, args.weight, args.full_width, args.hidden_size,
                        Traits::kRowsPerLoadB, kTileColumns / 64)) {
    return error;
  }
  if (const cudaError_t error = encode_rows(&maps.residual, args.residual, args.tokens,
                                            args.hidden_size, args.residual_stride, kTileRows)) {
    return error;
  }
  if (const cudaError_t error = encode_rows(&maps.out, args.out, args.tokens, args.hidden_size,
                                            args.out_stride, kTileRows)) {
    return error;
  }
  return launch<Traits>(maps, kernel_args, stream);
}

using Rows = GemmTraits<WeightForm::kRows, Epilogue::kBias>;
using RowsGelu = GemmTraits<WeightForm::kRows, Epilogue::kBiasGelu>;
using Columns = GemmTraits<WeightForm::kColumns, Epilogue::kResidual>;
using ColumnsNorm = GemmTraits<WeightForm::kColumns, Epilogue::kResidualNorm>;
static_assert(kFusedNormHiddenSize == kNormBlocks * kTileColumns);

}  // namespace

cudaError_t gemm_rows_sm90(const GemmRowsSm90& args, cudaStream_t stream) {
  if (!is_valid(args.tokens, args.hidden_size, args.full_width, args.width)) {
    return cudaErrorInvalidValue;
  }
  if (args.tokens == 0) return cudaSuccess;
  return args.gelu ? launch_rows<RowsGelu>(args, stream) : launch_rows<Rows>(args, stream);
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
  if (norm && args.hidden_size != kFusedNormHiddenSize) return cudaErrorInvalidValue;
  if (norm && args.norm_workspace == nullptr) return cudaErrorInvalidValue;
  if (args.tokens == 0) return cudaSuccess;
  return norm ? launch_columns<ColumnsNorm>(args, stream) : launch_columns<Columns>(args, stream);
}

}  // namespace dynabert
