// What a consumer of gemm_sm90.cuh does with a finished accumulator: bias, GELU, residual,
// LayerNorm, and the way out through shared memory.

#pragma once

#include "activation.cuh"
#include "grid_barrier.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "tile_schedule.h"
#include "tma.cuh"

namespace dynabert {

// 128 x 192: 192 divides 3 * 64 * heads, 768 and 3072 and their quarters without a ragged tile, and
// at 16,384 tokens leaves 97 % of 132 multiprocessors' turns filled at every one of those widths.
inline constexpr int kTileRows = 128;
inline constexpr int kTileColumns = 192;

// A row for LayerNorm: 768 columns, by a group of four blocks.
inline constexpr int kNormBlocks = 4;

// Rows 64 * half + ... of a tile; the order within a half is wgmma's.
using Accumulator = float[2][kTileColumns / 2];

enum class Epilogue { kBias, kResidual, kResidualNorm };  // an activation may follow the bias

struct GemmArguments {
  PrefixWidth width;
  std::int32_t tokens;
  std::int32_t hidden_size;
  std::int32_t full_width;
  const __nv_bfloat16* bias;
  const __nv_bfloat16* norm_weight;
  const __nv_bfloat16* norm_bias;
  unsigned long long* norm_workspace;
  float norm_eps;
};

// Over the four lanes that hold a row.
__device__ __forceinline__ float sum_row(float value) {
  value += __shfl_xor_sync(0xffffffff, value, 1);
  return value + __shfl_xor_sync(0xffffffff, value, 2);
}

template <class Traits>
class TileEpilogue {
 public:
  static constexpr bool kNorm = Traits::kNorm;
  static constexpr bool kResidual = Traits::kResidual;
  static constexpr int kPanels = kTileColumns / 64;  // each [128 rows][64 columns], swizzled
  static constexpr int kPanelBytes = kTileRows * 128;

  __device__ __forceinline__ TileEpilogue(std::uint32_t shared, const CUtensorMap* map_out,
                                          const CUtensorMap* map_residual,
                                          const GemmArguments& args, int columns, int consumer,
                                          int rank)
      : shared_(shared),
        map_out_(map_out),
        map_residual_(map_residual),
        args_(args),
        columns_(columns),
        consumer_(consumer),
        rank_(rank),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % 32) {}

  // With LayerNorm a block always has the same columns: their vectors are read once, as
  // [bias, norm_weight, norm_bias][192].
  static __device__ __forceinline__ void load_vectors(std::uint32_t shared,
                                                      const GemmArguments& args, int rank) {
    if constexpr (kNorm) {
      for (int i = threadIdx.x; i < kTileColumns; i += blockDim.x) {
        const int column = rank * kTileColumns + i;
        const std::uint32_t slot = shared + Traits::kVectors + i * 4;
        store_shared(slot, __bfloat162float(args.bias[column]));
        store_shared(slot + kTileColumns * 4, __bfloat162float(args.norm_weight[column]));
        store_shared(slot + 2 * kTileColumns * 4, __bfloat162float(args.norm_bias[column]));
      }
    }
  }

  // By one thread, when the staging buffer is free: hands it to the consumer of the next tile, with
  // that tile's residual in it.
  __device__ __forceinline__ void arm_staging(TileOrigin next, int for_consumer) const {
    const std::uint32_t barrier = shared_ + Traits::kStagingFull + for_consumer * 8;
    if constexpr (kResidual) {
      mbarrier_arrive_expect(barrier, kPanels * kPanelBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        tma_load(panel_address(panel), map_residual_, barrier, next.column + panel * 64, next.row);
      }
    } else {
      mbarrier_arrive(barrier);
    }
  }

  // Starts what the epilogue will need, ahead of the products.
  __device__ __forceinline__ void prefetch(TileOrigin origin) {
    if constexpr (!kNorm) {
      const int column = origin.column + 2 * thread_;
      bias_pair_ = 0;
      if (thread_ < kTileColumns / 2 && column < columns_) {
        // The bias may end with an odd number of values.
        bias_pair_ = column + 1 < columns_
                         ? __ldg(reinterpret_cast<const std::uint32_t*>(args_.bias + column))
                         : __ldg(reinterpret_cast<const std::uint16_t*>(args_.bias + column));
      }
    }
  }

  // Leaves the finished tile in the staging buffer, visible to the copy engine.
  __device__ __forceinline__ void run(const Accumulator& acc, std::uint32_t round) {
    if constexpr (kNorm) {
      mbarrier_wait(staging_barrier(), consumer_phase(round));
      normalise(acc);
    } else {
      if (thread_ < kTileColumns / 2) {
        const float2 bias = unpack_bf16(bias_pair_);
        store_shared(vector_address(0) + thread_ * 8, bias.x);
        store_shared(vector_address(0) + thread_ * 8 + 4, bias.y);
      }
      warpgroup_sync(1 + consumer_);
      mbarrier_wait(staging_barrier(), consumer_phase(round));
      finish_plain(acc);
    }
    fence_async_proxy();
    warpgroup_sync(1 + consumer_);
  }

  // By one thread, after run(): writes the tile out and returns when the buffer has been read.
  __device__ __forceinline__ void store(TileOrigin origin) const {
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = origin.column + panel * 64;
      if (column < columns_) tma_store(map_out_, panel_address(panel), column, origin.row);
    }
    tma_store_commit();
    tma_store_wait_read();
  }

 private:
  __device__ __forceinline__ std::uint32_t panel_address(int panel) const {
    return shared_ + Traits::kStaging + panel * kPanelBytes;
  }
  __device__ __forceinline__ std::uint32_t staging_barrier() const {
    return shared_ + Traits::kStagingFull + consumer_ * 8;
  }
  // With LayerNorm: vector 0, 1, 2 of the block. Otherwise: each consumer's own bias.
  __device__ __forceinline__ std::uint32_t vector_address(int vector) const {
    return shared_ + Traits::kVectors + (kNorm ? vector : consumer_) * kTileColumns * 4;
  }
  // This lane's two values of a vector for group `group` of 8 columns.
  __device__ __forceinline__ float2 vector_pair(int vector, int group) const {
    return load_shared_pair(vector_address(vector) + group * 32 + lane_ % 4 * 8);
  }
  // Where this lane's row of the 16 x 16 block `block` (of 12 along the tile) lies in staging.
  __device__ __forceinline__ std::uint32_t block_address(int half, int block) const {
    const std::uint32_t row = half * 64 + thread_ / 32 * 16 + lane_ % 16;
    const std::uint32_t chunk = block % 4 * 2 + lane_ / 16;
    return panel_address(block / 4) + row * 128 + ((chunk ^ (lane_ % 8)) << 4);
  }

  // What this lane holds of 16 x 16 block `block`, with bias and residual: value 2 * m + {0, 1} is
  // an element of matrix m, that is of row m % 2 * 8 + ... and column group m / 2.
  __device__ __forceinline__ void finished_block(float (&x)[8], const float (&d)[kTileColumns / 2],
                                                 const float2 (&bias)[2], int half,
                                                 int block) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = d[block * 8 + i] + (i % 2 ? bias[i / 4].y : bias[i / 4].x);
    if constexpr (kResidual) {
      std::uint32_t packed[4];
      load_matrix_x4(packed, block_address(half, block));
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix) {
        const float2 residual = unpack_bf16(packed[matrix]);
        x[2 * matrix] += residual.x;
        x[2 * matrix + 1] += residual.y;
      }
    }
  }

  __device__ __forceinline__ void store_block(const float (&x)[8], int half, int block) const {
    const std::uint32_t packed[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                     pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
    store_matrix_x4(block_address(half, block), packed);
  }

  __device__ __forceinline__ void finish_plain(const Accumulator& acc) const {
#pragma unroll
    for (int block = 0; block < kTileColumns / 16; ++block) {
      const float2 bias[2] = {vector_pair(0, 2 * block), vector_pair(0, 2 * block + 1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        finished_block(x, acc[half], bias, half, block);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = activate<Traits::kActivation>(x[i]);
        store_block(x, half, block);
      }
    }
  }

  // LayerNorm over the group's row, in two passes over accumulator and residual: the sums are added
  // up anew in each, because a third copy of the tile does not fit into the registers.
  //
  // The statistics are sums around a pivot, an element of this lane's part of the row, so that
  // no small variance is the difference of large sums: with n values the pivot's distance from
  // their mean is at most sqrt(n) standard deviations. Lanes and blocks are merged exactly (Chan).
  //
  // Blocks of a group tell each other through slots in device memory,
  // [block][consumer][source][row], in L2: clusters of four would leave a tenth of the
  // multiprocessors idle. All blocks are resident (the launch is cooperative), so waiting is safe.
  // A slot is zero until it is written and zero again once read. It is free when the consumer's
  // next round comes: only a block that has finished the round in between sends for it, and that
  // round waited for this block.
  __device__ __forceinline__ void normalise(const Accumulator& acc) const {
    send_statistics(acc);
    unsigned long long* const slots = statistics_slots(rank_, lane_ % 4);
    float scale[4], shift[4];  // normalised = value * scale + shift
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      receive_statistics(slots + row_of_part(part), scale[part], shift[part]);
    }
    __threadfence();

#pragma unroll
    for (int block = 0; block < kTileColumns / 16; ++block) {
      const float2 bias[2] = {vector_pair(0, 2 * block), vector_pair(0, 2 * block + 1)};
      const float2 norm_weight[2] = {vector_pair(1, 2 * block), vector_pair(1, 2 * block + 1)};
      const float2 norm_bias[2] = {vector_pair(2, 2 * block), vector_pair(2, 2 * block + 1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        finished_block(x, acc[half], bias, half, block);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int part = half * 2 + i / 2 % 2;
          const float2 weight = norm_weight[i / 4];
          const float2 offset = norm_bias[i / 4];
          x[i] = fmaf(fmaf(x[i], scale[part], shift[part]), i % 2 ? weight.y : weight.x,
                      i % 2 ? offset.y : offset.x);
        }
        store_block(x, half, block);
      }
    }
  }

  // This lane has four rows of the tile: part / 2 is the half, part % 2 the upper 8 rows.
  static __device__ __forceinline__ std::uint32_t row_of_part(int part) {
    return part / 2 * 64 + part % 2 * 8;
  }

  // The slots of this lane's rows, at row_of_part(), in `block`'s list of what `source` says.
  __device__ __forceinline__ unsigned long long* statistics_slots(int block, int source) const {
    // Else the address is made before the products and kept through them, and there is no register
    // for it.
    unsigned long long* const workspace = opaque(args_.norm_workspace);
    const std::uint32_t list =
        ((blockIdx.x - rank_ + block) * 2 + consumer_) * kNormBlocks + source;
    return workspace + list * kTileRows + thread_ / 32 * 16 + lane_ / 4;
  }

  // Sends mean and squared deviation of this block's columns to every block of the group.
  __device__ __forceinline__ void send_statistics(const Accumulator& acc) const {
    static_assert(kNormBlocks == 4, "one lane of four for each block");
    constexpr float kPerLane = kTileColumns / 4;
    float pivot[4], sum[4] = {}, squares[4] = {};
#pragma unroll
    for (int block = 0; block < kTileColumns / 16; ++block) {
      const float2 bias[2] = {vector_pair(0, 2 * block), vector_pair(0, 2 * block + 1)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        finished_block(x, acc[half], bias, half, block);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int part = half * 2 + i / 2 % 2;
          if (block == 0 && i % 2 == 0 && i < 4) pivot[part] = x[i];
          const float distance = x[i] - pivot[part];
          sum[part] += distance;
          squares[part] = fmaf(distance, distance, squares[part]);
        }
      }
    }
    unsigned long long* const slots = statistics_slots(lane_ % 4, rank_);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float lane_mean = sum[part] * (1.0f / kPerLane);
      const float mean = sum_row(pivot[part] + lane_mean) * 0.25f;
      const float distance = pivot[part] + lane_mean - mean;
      const float lane_squares = fmaxf(fmaf(-lane_mean, sum[part], squares[part]), 0.0f);
      const float deviation = sum_row(fmaf(distance * distance, kPerLane, lane_squares));
      // The sign bit, which no squared deviation has, tells a written slot from a free one.
      const unsigned long long packed =
          static_cast<unsigned long long>(__float_as_uint(deviation) | 0x80000000u) << 32 |
          __float_as_uint(mean);
      store_relaxed(slots + row_of_part(part), packed);
    }
  }

  // Each lane of four waits for one block's numbers and frees the slot.
  __device__ __forceinline__ void receive_statistics(unsigned long long* slot, float& scale,
                                                     float& shift) const {
    const unsigned long long packed = wait_for_nonzero(slot);
    store_relaxed(slot, 0);
    const float block_mean = __uint_as_float(static_cast<std::uint32_t>(packed));
    const float block_squares =
        __uint_as_float(static_cast<std::uint32_t>(packed >> 32) & 0x7fffffffu);
    const float mean = sum_row(block_mean) * (1.0f / kNormBlocks);
    const float distance = block_mean - mean;
    const float squares = sum_row(fmaf(distance * distance, kTileColumns, block_squares));
    scale = rsqrtf(fmaf(squares, 1.0f / (kTileColumns * kNormBlocks), args_.norm_eps));
    shift = -mean * scale;
  }

  std::uint32_t shared_;
  const CUtensorMap* map_out_;
  const CUtensorMap* map_residual_;
  const GemmArguments& args_;
  std::int32_t columns_;
  std::uint32_t consumer_;
  std::uint32_t rank_;
  std::uint32_t thread_;
  std::uint32_t lane_;
  std::uint32_t bias_pair_ = 0;
};

}  // namespace dynabert
