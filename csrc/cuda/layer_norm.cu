// The kernel of layer_norm.h. A row is read once and stays in registers: the mean, then the squares
// around it, then the result.

#include "launch.cuh"
#include "layer_norm.h"
#include "mma.cuh"
#include "tile_schedule.h"

namespace dynabert {
namespace {

constexpr int kChunk = 8;           // elements of a row that a lane loads at once
constexpr int kChunksPerLane = 4;   // at most
constexpr int kRowsPerBlock = 4;    // where a row is a warp's
constexpr int kWarpsOfWideRow = 8;  // else
constexpr int kWarpRow = 32 * kChunksPerLane * kChunk;
static_assert(kMaxNormHiddenSize == kWarpsOfWideRow * kWarpRow);

template <typename T>
struct RawChunk {
  uint4 words;
};
template <>
struct RawChunk<float> {
  float4 low, high;
};

template <typename T>
__device__ __forceinline__ RawChunk<T> load_chunk(const T* from) {
  return *reinterpret_cast<const RawChunk<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void to_floats(float (&x)[kChunk], const RawChunk<T>& raw) {
  const std::uint32_t words[4] = {raw.words.x, raw.words.y, raw.words.z, raw.words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ void to_floats(float (&x)[kChunk], const RawChunk<float>& raw) {
  const float values[kChunk] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = values[i];
}

template <typename T>
__device__ __forceinline__ void store_chunk(T* to, const float (&x)[kChunk]) {
  RawChunk<T> raw;
  if constexpr (sizeof(T) == 4) {
    raw = {{x[0], x[1], x[2], x[3]}, {x[4], x[5], x[6], x[7]}};
  } else {
    raw = {
        {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])}};
  }
  *reinterpret_cast<RawChunk<T>*>(to) = raw;
}

// Over the row's threads; all get the sum, added in one order.
template <int kWarps>
__device__ __forceinline__ float sum_of_row(float x, float* warp_sums) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  if constexpr (kWarps > 1) {
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += warp_sums[i];
  }
  return x;
}

// One group of kWarps warps normalises one row. Grid: all rows.
template <typename Projected, typename Hidden, int kWarps>
__global__ void __launch_bounds__(32 * (kWarps > 1 ? kWarps : kRowsPerBlock))
    layer_norm_kernel(const LayerNormCall call) {
  DYNABERT_SHARED_MEMORY(shared);
  constexpr int kLanes = 32 * kWarps;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t row = std::int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (row >= call.tokens) return;
  const auto* const projected = static_cast<const Projected*>(call.projected);
  const auto* const residual =
      static_cast<const Hidden*>(call.residual) + row * call.residual_stride;

  // All loads of the row are on their way before the first is used.
  RawChunk<Hidden> residual_chunks[kChunksPerLane];
  RawChunk<Projected> projected_chunks[kChunksPerLane];
  const auto column_of = [&](int i) { return (i * kLanes + lane) * kChunk; };
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    const int column = column_of(i);
    residual_chunks[i] = {};
    projected_chunks[i] = {};  // zeros
    if (column >= call.hidden_size) continue;
    residual_chunks[i] = load_chunk(residual + column);
    if (projected != nullptr) {
      projected_chunks[i] = load_chunk(projected + row * call.projected_stride + column);
    }
  }

  float x[kChunksPerLane][kChunk];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
    float addend[kChunk];
    to_floats(x[i], residual_chunks[i]);
    to_floats(addend, projected_chunks[i]);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      x[i][e] += addend[e];
      sum += x[i][e];
    }
  }
  float* const warp_sums = reinterpret_cast<float*>(shared);
  const float size = static_cast<float>(call.hidden_size);
  const float mean = sum_of_row<kWarps>(sum, warp_sums) / size;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunksPerLane; ++i) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      x[i][e] -= mean;
      if (column_of(i) < call.hidden_size) squares = fmaf(x[i][e], x[i][e], squares);
    }
  }
  const float variance = sum_of_row<kWarps>(squares, warp_sums + kWarps) / size;
  const float scale = 1.0f / sqrtf(variance + call.norm_eps);

  auto* const out = static_cast<Hidden*>(call.out) + row * call.out_stride;
  const auto finish = [&]<typename Norm>() {
#pragma unroll
    for (int i = 0; i < kChunksPerLane; ++i) {
      const int column = column_of(i);
      if (column >= call.hidden_size) continue;
      float weight[kChunk], bias[kChunk];
      to_floats(weight, load_chunk(static_cast<const Norm*>(call.norm_weight) + column));
      to_floats(bias, load_chunk(static_cast<const Norm*>(call.norm_bias) + column));
#pragma unroll
      for (int e = 0; e < kChunk; ++e) x[i][e] = fmaf(x[i][e] * scale, weight[e], bias[e]);
      store_chunk(out + column, x[i]);
    }
  };
  switch (call.norm_type) {
    case ElementType::kFloat32:
      finish.template operator()<float>();
      break;
    case ElementType::kBfloat16:
      finish.template operator()<__nv_bfloat16>();
      break;
    case ElementType::kFloat16:
      finish.template operator()<__half>();
      break;
  }
}

template <typename Projected, typename Hidden>
cudaError_t launch(const LayerNormCall& call, cudaStream_t stream) {
  const bool wide = call.hidden_size > kWarpRow;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(wide ? call.tokens : ceil_div(call.tokens, kRowsPerBlock)));
  shape.block = dim3(32 * (wide ? kWarpsOfWideRow : kRowsPerBlock));
  if (!wide) return launch_kernel(layer_norm_kernel<Projected, Hidden, 1>, shape, stream, call);
  shape.shared_bytes = 2 * kWarpsOfWideRow * sizeof(float);
  return launch_kernel(layer_norm_kernel<Projected, Hidden, kWarpsOfWideRow>, shape, stream, call);
}

template <typename Projected>
cudaError_t launch(const LayerNormCall& call, cudaStream_t stream) {
  switch (call.hidden_type) {
    case ElementType::kFloat32:
      return launch<Projected, float>(call, stream);
    case ElementType::kBfloat16:
      return launch<Projected, __nv_bfloat16>(call, stream);
    case ElementType::kFloat16:
      return launch<Projected, __half>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t layer_norm(const LayerNormCall& call, cudaStream_t stream) {
  if (call.tokens < 0 || call.hidden_size < kChunk || call.hidden_size % kChunk != 0 ||
      call.hidden_size > kMaxNormHiddenSize) {
    return cudaErrorInvalidValue;
  }
  if (call.tokens == 0) return cudaSuccess;
  switch (call.projected_type) {
    case ElementType::kBfloat16:
      return launch<__nv_bfloat16>(call, stream);
    case ElementType::kFloat16:
      return launch<__half>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dynabert
