// The kernel behind attention_core.h and its launch, for one element type.
//
// A block computes one head of one query tile (attention_schedule.h). Its shared memory holds the
// tile's queries and 128 rows each of keys and values, filled by cp.async:
//
//   up to 128 keys   all resident; one softmax; values still arrive while scores are computed
//   more             tiles of 64 keys in two buffers, one arriving while the other is used; running
//                    maximum
//
// A warp owns 16 queries. Scores stay in the registers in which the tensor cores leave them, which
// is where the product with the values wants the probabilities.

#pragma once

#include <cmath>

#include "../cuda/device.cuh"
#include "../cuda/launch.cuh"
#include "../cuda/mma.cuh"
#include "attention_core.h"
#include "attention_schedule.h"

namespace dynabert::core {

inline constexpr unsigned kAllLanes = 0xffffffffu;

struct CoreArguments {
  const void* qkv;
  void* context;
  std::uint32_t qkv_stride;  // bytes between tokens
  std::uint32_t context_stride;
  const std::int32_t* cu_seqlens;
  Widths heads;
  QuerySchedule schedule;
  std::int32_t max_seqlen;
  std::int32_t key_rows;  // in shared memory
  float scale;            // log2(e) / sqrt(D): powers of two are cheaper than those of e
};

// The warp's number in its block, in a form that tells the compiler that its lanes agree on it.
__device__ __forceinline__ std::int32_t warp_number() {
  return __shfl_sync(kAllLanes, static_cast<std::int32_t>(threadIdx.x) / 32, 0);
}

// Copies rows [0, rows) by all threads of the block; those from num_present on become zeros, since
// a probability of zero does not undo a NaN. Of two parts, keys and values, the second lies beside
// the first in global memory, and `distance` behind it in shared memory. stride in bytes.
template <int kHeadDim, int kParts>
__device__ __forceinline__ void copy_rows(std::uint32_t shared, std::uint32_t distance,
                                          const void* source, std::uint32_t stride,
                                          std::int32_t num_present, std::int32_t rows) {
  using Rows = SharedRows<kHeadDim>;
  const std::int32_t step = blockDim.x / Rows::kPieces;  // rows of all threads together
  std::int32_t row = threadIdx.x / Rows::kPieces, piece = threadIdx.x % Rows::kPieces;
  const char* from = static_cast<const char*>(source) + std::uint64_t{stride} * row + piece * 16;
#pragma unroll 1
  while (row < rows) {
    const bool present = row < num_present;
    const char* const readable = present ? from : static_cast<const char*>(source);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      copy_async_zfill_16(shared + part * distance + Rows::offset(row, piece),
                          readable + part * kHeadDim * 2, present ? 16 : 0);
    }
    row += step;
    from += std::uint64_t{stride} * step;
    if constexpr (!Rows::kSwizzled) {  // the threads are not whole rows
      piece += blockDim.x % Rows::kPieces;
      from += blockDim.x % Rows::kPieces * 16;
      if (piece >= Rows::kPieces) {
        piece -= Rows::kPieces;
        from += stride - Rows::kPieces * 16;
        ++row;
      }
    }
  }
}

// 16 queries of a warp. With g = lane / 4 and t = lane % 4 a lane holds parts of rows g and g + 8,
// and of keys or dimensions 2t and 2t + 1 of every 8; four lanes share a row.
//
// kRunning: keys come in several calls, and earlier sums are brought down to the maximum so far.
template <class T, int kHeadDim, bool kRunning>
struct QueryRows {
  using Rows = SharedRows<kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr bool kKept = kRunning;  // queries that are met again

  std::uint32_t query[kSteps][4];
  float out[kHeadDim / 8][4];
  float maximum[2];
  float sum[2];  // of this lane's probabilities

  __device__ __forceinline__ void load_query(std::uint32_t queries, int k, int lane) {
    const std::uint32_t address = queries + Rows::offset(lane % 16, lane / 16);
    load_matrix_x4(query[k], Rows::advance(address, 2 * k));
  }

  __device__ __forceinline__ void begin(std::uint32_t queries, int lane) {
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load_query(queries, k, lane);
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Probabilities of kSpans * 32 keys, of which the first num_keys exist, relative to the maximum.
  template <int kSpans>
  __device__ __forceinline__ void weigh(std::uint32_t (&probability)[2 * kSpans][4],
                                        std::uint32_t queries, std::uint32_t keys,
                                        std::int32_t num_keys, float scale, int lane) {
    float score[4 * kSpans][4] = {};
    const std::uint32_t address = keys + Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if constexpr (!kKept) load_query(queries, k, lane);
#pragma unroll
      for (int i = 0; i < 2 * kSpans; ++i) {
        std::uint32_t key[4];
        load_matrix_x4(key, Rows::advance(address, 2 * k) + i * 16 * Rows::kBytes);
        mma_m16n8k16<T>(score[2 * i], query[k][0], query[k][1], query[k][2], query[k][3], key[0],
                        key[1]);
        mma_m16n8k16<T>(score[2 * i + 1], query[k][0], query[k][1], query[k][2], query[k][3],
                        key[2], key[3]);
      }
    }
    if (num_keys < kSpans * kKeySpan) {
#pragma unroll
      for (int i = kRunning ? 0 : 4 * (kSpans - 1); i < 4 * kSpans; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (i * 8 + lane % 4 * 2 + e % 2 >= num_keys) score[i][e] = -INFINITY;
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = maximum[r];
#pragma unroll
      for (int i = 0; i < 4 * kSpans; ++i) {
        top = fmaxf(top, fmaxf(score[i][2 * r], score[i][2 * r + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      if constexpr (kRunning) {
        const float shrink = exp2_approx((maximum[r] - top) * scale);
        sum[r] *= shrink;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          out[j][2 * r] *= shrink;
          out[j][2 * r + 1] *= shrink;
        }
      }
      maximum[r] = top;
    }
#pragma unroll
    for (int i = 0; i < 4 * kSpans; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = exp2_approx(fmaf(score[i][2 * r], scale, -maximum[r] * scale));
        const float high = exp2_approx(fmaf(score[i][2 * r + 1], scale, -maximum[r] * scale));
        sum[r] += low + high;
        probability[i / 2][i % 2 * 2 + r] = pack2<T>(low, high);
      }
    }
  }

  template <int kSpans>
  __device__ __forceinline__ void accumulate(const std::uint32_t (&probability)[2 * kSpans][4],
                                             std::uint32_t values, int lane) {
    const std::uint32_t address = values + Rows::offset(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < 2 * kSpans; ++i) {
      const std::uint32_t (&p)[4] = probability[i];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        std::uint32_t value[4];
        load_matrix_transposed_x4(value, Rows::advance(address, 2 * j) + i * 16 * Rows::kBytes);
        mma_m16n8k16<T>(out[2 * j], p[0], p[1], p[2], p[3], value[0], value[1]);
        mma_m16n8k16<T>(out[2 * j + 1], p[0], p[1], p[2], p[3], value[2], value[3]);
      }
    }
  }

  // Through `staging`, where this warp's queries were, so that the stores are of 16 bytes.
  __device__ __forceinline__ void store(char* context, std::uint32_t stride, std::int32_t num_rows,
                                        unsigned char* staging, int lane) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
      const float inverse = __fdividef(1.0f, sum[r]);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<std::uint32_t*>(staging + Rows::offset(lane / 4 + 8 * r, j) +
                                          lane % 4 * 4) =
            pack2<T>(out[j][2 * r] * inverse, out[j][2 * r + 1] * inverse);
      }
    }
    __syncwarp();
#pragma unroll
    for (int turn = 0; turn < Rows::kPieces / 2; ++turn) {
      const int i = turn * 32 + lane, row = i / Rows::kPieces, piece = i % Rows::kPieces;
      if (row >= num_rows) continue;
      *reinterpret_cast<uint4*>(context + static_cast<std::uint64_t>(row) * stride + piece * 16) =
          *reinterpret_cast<const uint4*>(staging + Rows::offset(row, piece));
    }
  }
};

// One head of one query tile, as a thread of its block sees it.
template <class T, int kHeadDim>
struct HeadTile {
  using Rows = SharedRows<kHeadDim>;

  const CoreArguments& args;
  unsigned char* shared;
  std::int32_t head;
  std::int32_t begin;     // token at which the sequence begins
  std::int32_t length;    // of the sequence
  std::int32_t first;     // query of the sequence at which the tile begins
  std::int32_t num_rows;  // queries of the tile

  __device__ __forceinline__ std::uint32_t queries() const { return shared_address(shared); }
  __device__ __forceinline__ std::uint32_t keys() const {
    return queries() + args.schedule.tile_rows * Rows::kBytes;
  }
  __device__ __forceinline__ std::uint32_t values() const {
    return keys() + args.key_rows * Rows::kBytes;
  }

  // Queries, keys or values (part 0, 1, 2), or two of them, from a row of the sequence on.
  template <int kParts>
  __device__ __forceinline__ void copy(std::uint32_t target, int part, std::int32_t row,
                                       std::int32_t num_present, std::int32_t rows) const {
    const std::int64_t offset =
        row_offset(begin + row, args.qkv_stride, head * 3 + part, kHeadDim * 2);
    copy_rows<kHeadDim, kParts>(target, values() - keys(),
                                static_cast<const char*>(args.qkv) + offset, args.qkv_stride,
                                num_present, rows);
  }
  __device__ __forceinline__ void copy_queries() const {
    copy<1>(queries(), 0, first, num_rows, ceil_div(num_rows, kWarpRows) * kWarpRows);
  }

  template <bool kRunning>
  __device__ __forceinline__ void store(QueryRows<T, kHeadDim, kRunning>& rows, std::int32_t row,
                                        int lane) const {
    const std::int64_t offset =
        row_offset(begin + first + row, args.context_stride, head, kHeadDim * 2);
    rows.store(static_cast<char*>(args.context) + offset, args.context_stride, num_rows - row,
               shared + row * Rows::kBytes, lane);
  }

  // All keys are resident: kSpans * 32 hold them. Warps go over the queries in turns.
  template <int kSpans>
  __device__ __forceinline__ void attend_resident() const {
    const int warp = warp_number(), lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    copy_queries();
    copy<1>(keys(), 1, 0, length, kSpans * kKeySpan);
    copy_async_commit();
    copy<1>(values(), 2, 0, length, kSpans * kKeySpan);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
#pragma unroll 1
    for (std::int32_t row = warp * kWarpRows; row < args.schedule.tile_rows;
         row += num_warps * kWarpRows) {
      QueryRows<T, kHeadDim, false> rows;
      std::uint32_t probability[2 * kSpans][4];
      if (row < num_rows) {
        const std::uint32_t address = queries() + row * Rows::kBytes;
        rows.begin(address, lane);
        rows.template weigh<kSpans>(probability, address, keys(), length, args.scale, lane);
      }
      if (row < num_warps * kWarpRows) {  // the first turn, which every warp has
        copy_async_wait<0>();
        __syncthreads();
      }
      if (row >= num_rows) return;
      rows.template accumulate<kSpans>(probability, values(), lane);
      store(rows, row, lane);
    }
  }

  // Keys stream by in tiles of 64. A warp has 16 queries, or none.
  __device__ __forceinline__ void attend_streamed() const {
    constexpr int kSpans = kStreamedKeys / kKeySpan;
    const int lane = threadIdx.x % 32;
    const std::int32_t row = warp_number() * kWarpRows;
    const std::uint32_t address = queries() + row * Rows::kBytes;
    auto copy_tile = [&](std::int32_t key, std::uint32_t buffer) {
      copy<2>(keys() + buffer, 1, key, length - key, kStreamedKeys);
      copy_async_commit();
    };
    QueryRows<T, kHeadDim, true> rows;
    copy_queries();
    copy_tile(0, 0);
    copy_async_wait<0>();
    __syncthreads();
    rows.begin(address, lane);
    std::uint32_t buffer = 0;
#pragma unroll 1
    for (std::int32_t key = 0; key < length; key += kStreamedKeys) {
      const std::uint32_t used = buffer;
      buffer ^= kStreamedKeys * Rows::kBytes;
      const bool more = key + kStreamedKeys < length;
      if (more) copy_tile(key + kStreamedKeys, buffer);
      if (row < num_rows) {
        std::uint32_t probability[2 * kSpans][4];
        rows.template weigh<kSpans>(probability, address, keys() + used, length - key, args.scale,
                                    lane);
        rows.template accumulate<kSpans>(probability, values() + used, lane);
      }
      if (more) {
        copy_async_wait<0>();
        __syncthreads();  // the next tile is there, and this one has been read
      }
    }
    if (row < num_rows) store(rows, row, lane);
  }
};

// Grid: (slot, head), heads fastest. Block: up to 8 warps.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(max_warps(kHeadDim) * 32, resident_blocks(kHeadDim))
    attention_core_kernel(const CoreArguments args) {
  DYNABERT_SHARED_MEMORY(shared);
  const std::int32_t head = blockIdx.x % args.heads.limit;
  const QueryTile tile = args.schedule.tile(args.cu_seqlens, blockIdx.x / args.heads.limit);
  const std::int32_t begin = args.cu_seqlens[tile.sequence];
  // Shared memory has no room for more, should a sequence be longer than was said.
  const std::int32_t length = min(args.cu_seqlens[tile.sequence + 1] - begin, args.max_seqlen);
  if (tile.first >= length || head >= width_of(args.heads, tile.sequence)) return;

  const std::int32_t first = static_cast<std::int32_t>(tile.first);
  const HeadTile<T, kHeadDim> work = {
      args, shared, head, begin, length, first, min(length - first, args.schedule.tile_rows)};
  if (length > kShortLength) {
    work.attend_streamed();
  } else if (length > 3 * kKeySpan) {
    work.template attend_resident<4>();
  } else if (length > 2 * kKeySpan) {
    work.template attend_resident<3>();
  } else if (length > kKeySpan) {
    work.template attend_resident<2>();
  } else {
    work.template attend_resident<1>();
  }
}

template <class T, int kHeadDim>
cudaError_t launch_core(const AttentionCore& call, cudaStream_t stream) {
  const BlockShape shape = block_shape(call.max_seqlen, call.batch, call.tokens, call.heads.limit,
                                       kHeadDim, multiprocessors());
  const QuerySchedule schedule(call.batch, call.tokens, call.max_seqlen, shape.tile_rows);
  const std::int64_t blocks = schedule.slots * call.heads.limit;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const CoreArguments args = {call.qkv,
                              call.context,
                              static_cast<std::uint32_t>(call.qkv_stride * 2),
                              static_cast<std::uint32_t>(call.context_stride * 2),
                              call.cu_seqlens,
                              call.heads,
                              schedule,
                              call.max_seqlen,
                              shape.key_rows,
                              1.44269504f / std::sqrt(static_cast<float>(kHeadDim))};
  static_assert(3 * 128 * SharedRows<kHeadDim>::kBytes <= 99 * 1024, "the smallest of any sm_8x");
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(blocks));
  launch.block = dim3(shape.warps * 32);
  launch.shared_bytes = (shape.tile_rows + 2 * shape.key_rows) * SharedRows<kHeadDim>::kBytes;
  return launch_kernel(attention_core_kernel<T, kHeadDim>, launch, stream, args);
}

template <class T>
cudaError_t launch_core(const AttentionCore& call, cudaStream_t stream) {
  switch (call.head_dim) {
    case 32:
      return launch_core<T, 32>(call, stream);
    case 64:
      return launch_core<T, 64>(call, stream);
    case 80:
      return launch_core<T, 80>(call, stream);
    case 128:
      return launch_core<T, 128>(call, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dynabert::core
