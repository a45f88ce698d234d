// What all parts of the persistent encoder share: threads, barriers, buffers, LayerNorm.

#pragma once

#include <cstdint>

#include "../cuda/mma.cuh"
#include "encoder_cuda.h"
#include "encoder_schedule.h"

namespace dynabert::encoder {

using bf16 = __nv_bfloat16;

inline constexpr int kMmaThreads = 128;
inline constexpr int kLoaders = kLoaderWarps * 32;
inline constexpr int kThreads = kMmaThreads + kLoaders;

// Named barriers.
inline constexpr int kHalfReady = 1;  // and 2: half of the activations are in shared memory
inline constexpr int kLoadersMeet = 3;
inline constexpr int kMmaMeet = 4;
inline constexpr int kStaged = 5;  // what the first warpgroup fetched for this product is there

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Intermediate results in device memory. LayerNorm statistics are, per row and slice of columns,
// (mean, sum of squared deviations from it) of the bf16 sums.
struct Workspace {
  unsigned long long* barrier;
  float2* attention_statistics;  // [tokens, kNormSlices]
  float2* ffn_statistics;        // [tokens, kNormSlices]
  bf16* attention_sums;          // [tokens, hidden_size]
  bf16* ffn_sums;                // [tokens, hidden_size]
  bf16* hidden;                  // [tokens, hidden_size], normalised input of the layer
  bf16* middle;                  // [tokens, hidden_size], normalised output of attention
  bf16* qkv;                     // [tokens, num_heads, 3, head_dim]
  bf16* context;                 // [tokens, num_heads, head_dim]
  bf16* activation;              // [tokens, intermediate_size]
};

struct Parameters {
  EncoderCall call;
  Workspace workspace;
  SharedPlan shared;
  int tokens;
  int sequences;
  int hidden_size;
  int max_heads;
  int max_intermediate;
  int norm_columns;  // of a slice of the products that end in LayerNorm
};

// Eight neighbouring lanes ask for the statistics of a row, two slices each.
struct SliceStatistics {
  float2 low, high;  // of slices index and index + 8
};

__device__ __forceinline__ SliceStatistics read_statistics(const float2* row, int index) {
  return {__ldcg(row + index), __ldcg(row + index + 8)};
}

// All eight get (1 / deviation, -mean / deviation) of the row. The order of the sums is that of a
// butterfly: fixed.
__device__ __forceinline__ float2 merge_statistics(SliceStatistics own, int index, int columns,
                                                   int hidden_size, float eps) {
  // Slices past the last have no columns, the last may have fewer than the others.
  const int low = min(max(hidden_size - index * columns, 0), columns);
  const int high = min(max(hidden_size - (index + 8) * columns, 0), columns);
  float mean = (low > 0 ? own.low.x * low : 0.0f) + (high > 0 ? own.high.x * high : 0.0f);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) mean += __shfl_xor_sync(kAllLanes, mean, step);
  mean /= static_cast<float>(hidden_size);
  float squares = 0.0f;
  if (low > 0) squares = own.low.y + (own.low.x - mean) * (own.low.x - mean) * low;
  if (high > 0) squares += own.high.y + (own.high.x - mean) * (own.high.x - mean) * high;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
  const float scale = rsqrtf(squares / static_cast<float>(hidden_size) + eps);
  return make_float2(scale, -mean * scale);
}

// statistics: (1 / deviation, -mean / deviation).
__device__ __forceinline__ std::uint32_t normalise_pair(std::uint32_t pair, float2 statistics,
                                                        std::uint32_t weight, std::uint32_t bias) {
  const float2 x = unpack_bf16(pair), w = unpack_bf16(weight), b = unpack_bf16(bias);
  return pack_bf16(fmaf(fmaf(x.x, statistics.x, statistics.y), w.x, b.x),
                   fmaf(fmaf(x.y, statistics.x, statistics.y), w.y, b.y));
}

__device__ __forceinline__ uint4 normalise_eight(uint4 x, float2 statistics, uint4 weight,
                                                 uint4 bias) {
  return make_uint4(normalise_pair(x.x, statistics, weight.x, bias.x),
                    normalise_pair(x.y, statistics, weight.y, bias.y),
                    normalise_pair(x.z, statistics, weight.z, bias.z),
                    normalise_pair(x.w, statistics, weight.w, bias.w));
}

}  // namespace dynabert::encoder
