// The kernel behind gemm_sm90.h: persistent, warp-specialised, two consumers in ping-pong.
//
// A block has three warpgroups. One thread of the first keeps a ring of kStages K blocks filled by
// the copy engine. The other two multiply: each owns a whole 128-row tile, and they take rounds in
// turn, so that while one finishes its tile (bias, GELU, residual, LayerNorm, store) the other
// keeps the tensor cores busy. The ring carries their K blocks one after the other. A consumer
// begins its round when the other has found its last K block full (`kTurn`): a barrier tells only
// the parity of its phase, so nobody may look at a stage two phases ahead.
//
//   producer    | round 0 K blocks | round 1 K blocks | round 2 K blocks | ...
//   consumer 0  |  multiply 0      |  finish 0        |  multiply 2      | ...
//   consumer 1                     |  multiply 1      |  finish 1        | ...
//
// The two blocks of a cluster work on the same columns: each loads half of B's tile and multicasts
// it, which halves what B costs in L2 bandwidth. With LayerNorm a group of four blocks works on the
// same rows instead, and together has whole rows of the output.
//
// Finished tiles leave through one staging buffer that the consumers use in turn, and the residual
// enters through the same buffer: it is fetched as soon as the store before it has been read.

#pragma once

#include "gemm_epilogue_sm90.cuh"
#include "mbarrier.cuh"
#include "tile_schedule.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dynabert {

enum class WeightForm {
  kRows,     // B[n, k]: the prefix is on the output columns
  kColumns,  // B[k, n]: the prefix is on K
};

template <WeightForm kWeightForm, Epilogue kEpilogueKind,
          Activation kActivationKind = Activation::kNone>
struct GemmTraits {
  static constexpr WeightForm kForm = kWeightForm;
  static constexpr Epilogue kEpilogue = kEpilogueKind;
  static constexpr Activation kActivation = kActivationKind;
  static constexpr bool kNorm = kEpilogue == Epilogue::kResidualNorm;
  static constexpr bool kResidual = kNorm || kEpilogue == Epilogue::kResidual;
  // Blocks that share B, and blocks that take the same round together.
  static constexpr int kCluster = kNorm ? 1 : 2;
  static constexpr int kGroup = kNorm ? kNormBlocks : kCluster;
  static constexpr TileShape kTile = {kTileRows, kTileColumns, kCluster, kGroup / kCluster};

  static constexpr int kStages = 4;
  static constexpr int kBlockK = 64;  // 128 bytes: a row of the swizzle
  static constexpr int kBytesA = kTileRows * kBlockK * 2;
  static constexpr int kBytesB = kTileColumns * kBlockK * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // What one block loads of B, in rows of the weight.
  static constexpr int kRowsPerLoadB =
      (kForm == WeightForm::kRows ? kTileColumns : kBlockK) / kCluster;

  // Offsets in shared memory.
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kVectors = kStaging + kTileRows * kTileColumns * 2;
  static constexpr int kBarriers = kVectors + 3 * kTileColumns * 4;
  static constexpr int kFull = kBarriers;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kStagingFull = kEmpty + kStages * 8;
  static constexpr int kTurn = kStagingFull + 2 * 8;
  static constexpr int kSharedBytes = kTurn + 2 * 8;
  static_assert(kSharedBytes <= 227 * 1024);
};

inline constexpr int kWarpgroup = 128;
inline constexpr int kGemmThreads = 3 * kWarpgroup;

template <class Traits>
struct GemmShape {
  TileSchedule schedule;
  std::int32_t columns;   // of the output
  std::int32_t k_blocks;  // of a tile
  std::int32_t k_tail;    // K values of the last block to keep of what the tensor maps give

  __device__ __forceinline__ explicit GemmShape(const GemmArguments& args)
      : schedule(Traits::kTile, args.tokens, output_columns(args)), columns(output_columns(args)) {
    const std::int32_t depth = Traits::kForm == WeightForm::kRows ? args.hidden_size : prefix(args);
    // At least one, so that a width of 0 in device memory gives the bias alone.
    k_blocks = max(1, ceil_div(depth, Traits::kBlockK));
    // The tensor maps end at a width of the host and fill up with zeros; they know none in device
    // memory, beyond which x and weight may be anything.
    k_tail = args.width.device_count != nullptr ? depth - (k_blocks - 1) * Traits::kBlockK
                                                : Traits::kBlockK;
  }

 private:
  // A width in device memory is not known to the host's checks; the weight ends at full_width.
  static __device__ __forceinline__ std::int32_t prefix(const GemmArguments& args) {
    return max(0, min(args.width.rows(), args.full_width));
  }
  static __device__ __forceinline__ std::int32_t output_columns(const GemmArguments& args) {
    return Traits::kForm == WeightForm::kRows ? prefix(args) : args.hidden_size;
  }
};

// Loads K block `block` of the tile at `origin` into a stage.
template <class Traits>
__device__ __forceinline__ void load_stage(std::uint32_t stage, std::uint32_t barrier,
                                           const CUtensorMap* map_a, const CUtensorMap* map_b,
                                           TileOrigin origin, int block, int rank) {
  const int k = block * Traits::kBlockK;
  tma_load(stage, map_a, barrier, k, origin.row);

  constexpr std::uint16_t kEveryBlock = (1 << Traits::kCluster) - 1;
  const std::uint32_t stage_b = stage + Traits::kBytesA;
  const int part = rank % Traits::kCluster * Traits::kRowsPerLoadB;
  if constexpr (Traits::kForm == WeightForm::kRows) {
    tma_load_multicast(stage_b + part * 128, map_b, barrier, kEveryBlock, k, origin.column + part);
  } else if constexpr (Traits::kCluster > 1) {
    // The map is 3-D, [C / 64, K, 64]: one box brings the tile's three 64-column panels.
    tma_load_multicast(stage_b + part * 128 * (kTileColumns / 64), map_b, barrier, kEveryBlock, 0,
                       k + part, origin.column / 64);
  } else {
    tma_load(stage_b, map_b, barrier, 0, k, origin.column / 64);
  }
}

template <class Traits>
__device__ __forceinline__ void produce(std::uint32_t shared, const CUtensorMap* map_a,
                                        const CUtensorMap* map_b, const GemmShape<Traits>& shape,
                                        int group, int num_groups, int rank) {
  RingPosition<Traits::kStages> position = {0};
  for (int index = group; index < shape.schedule.count; index += num_groups) {
    const TileOrigin origin = shape.schedule.origin(index, rank);
    for (int block = 0; block < shape.k_blocks; ++block, ++position.block) {
      const std::uint32_t stage = position.stage();
      const std::uint32_t full = shared + Traits::kFull + stage * 8;
      mbarrier_wait(shared + Traits::kEmpty + stage * 8, position.parity() ^ 1);
      mbarrier_arrive_expect(full, Traits::kStageBytes);
      load_stage<Traits>(shared + stage * Traits::kStageBytes, full, map_a, map_b, origin, block,
                         rank);
    }
  }
}

// Zeroes the K values from `tail` on of a stage that has come, in x and in a transposed weight; the
// 128 threads of a consumer. What lies there may be NaN, which a product with zero would keep.
template <class Traits>
__device__ __forceinline__ void clear_tail(std::uint32_t stage, int tail, int consumer) {
  const int thread = threadIdx.x % kWarpgroup;
  static_assert(kTileRows == kWarpgroup, "a row of x for each thread");
  for (int piece = tail / 8; piece < Traits::kBlockK / 8; ++piece) {
    const std::uint32_t place = stage + thread * 128 + (piece ^ thread % 8) * 16;
    const int kept = tail - piece * 8;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (kept > 0) {
      const uint4 all = load_shared_uint4(place);
      const auto pair = [kept](std::uint32_t both, int first) {
        return first + 1 < kept ? both : first < kept ? both & 0xffffu : 0u;
      };
      values = make_uint4(pair(all.x, 0), pair(all.y, 2), pair(all.z, 4), pair(all.w, 6));
    }
    store_shared(place, values);
  }

  // [part of K][panel of 64 columns][K value], 128 bytes for each.
  constexpr int kPanels = kTileColumns / 64;
  constexpr int kRows = Traits::kRowsPerLoadB;
  for (int i = thread; i < (Traits::kBlockK - tail) * kPanels * 8; i += kWarpgroup) {
    const int value = tail + i / (kPanels * 8), piece = i % (kPanels * 8);
    const int line = (value / kRows * kPanels + piece / 8) * kRows + value % kRows;
    store_shared(stage + Traits::kBytesA + line * 128 + piece % 8 * 16, make_uint4(0, 0, 0, 0));
  }
  fence_async_proxy();
  warpgroup_sync(1 + consumer);
}

// acc = the tile's product over its K blocks, which begin at `position` in the ring. When the last
// of them has come, it is the other consumer's turn.
template <class Traits>
__device__ __forceinline__ void multiply(Accumulator& acc, std::uint32_t shared,
                                         RingPosition<Traits::kStages> position,
                                         const GemmShape<Traits>& shape, int consumer,
                                         std::uint32_t next_turn) {
  constexpr bool kTransposeB = Traits::kForm == WeightForm::kColumns;
  // A transposed B lies as [part of K][panel of 64 columns][K value]: one part per load.
  constexpr std::uint32_t kPanel = Traits::kRowsPerLoadB * 128;
  constexpr std::uint32_t kPart = kPanel * (kTileColumns / 64);
  const std::uint32_t lane = threadIdx.x % 32;

  // A stage is free once every consumer warp that reads it, here and in the blocks that multicast
  // into it, has said so; lane r tells block r.
  const auto release = [&](std::uint32_t block) {
    if (lane < Traits::kCluster) {
      const std::uint32_t stage = block % Traits::kStages;
      mbarrier_arrive_cluster(shared + Traits::kEmpty + stage * 8, lane);
    }
  };

  pin_registers(acc[0]);
  pin_registers(acc[1]);
  for (int block = 0; block < shape.k_blocks; ++block, ++position.block) {
    const std::uint32_t stage = position.stage();
    mbarrier_wait(shared + Traits::kFull + stage * 8, position.parity());
    const bool last = block == shape.k_blocks - 1;
    if (last) {
      // Every warp passes the turn on: one that had not yet seen its own would miss it, should the
      // other consumer hand it back meanwhile.
      __syncwarp();
      if (lane == 0) mbarrier_arrive(next_turn);
    }
    const std::uint32_t address = shared + stage * Traits::kStageBytes;
    if constexpr (kTransposeB) {
      if (last && shape.k_tail < Traits::kBlockK)
        clear_tail<Traits>(address, shape.k_tail, consumer);
    }
    const std::uint64_t a = wgmma_descriptor(address, 16, 1024);
    const std::uint64_t b =
        wgmma_descriptor(address + Traits::kBytesA, kTransposeB ? kPanel : 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Traits::kBlockK / 16; ++step) {
      constexpr int kStepsPerPart = kTransposeB ? Traits::kRowsPerLoadB / 16 : 4;
      const std::uint32_t offset_b =
          kTransposeB ? step / kStepsPerPart * kPart + step % kStepsPerPart * 2048 : step * 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma_m64n192k16<kTransposeB>(acc[half], wgmma_advance(a, half * 64 * 128 + step * 32),
                                      wgmma_advance(b, offset_b), step > 0 || block > 0);
      }
    }
    wgmma_commit();
    // One group stays in flight; the one before it has finished reading its stage.
    wgmma_wait<1>();
    if (block > 0) release(position.block - 1);
  }
  wgmma_wait<0>();
  pin_registers(acc[0]);
  pin_registers(acc[1]);
  release(position.block - 1);
}

template <class Traits>
__device__ __forceinline__ void consume(std::uint32_t shared, const CUtensorMap* map_out,
                                        const CUtensorMap* map_residual, const GemmArguments& args,
                                        const GemmShape<Traits>& shape, int consumer, int group,
                                        int num_groups, int rank) {
  using Finish = TileEpilogue<Traits>;
  Finish finish(shared, map_out, map_residual, args, shape.columns, consumer, rank);
  const auto arm_staging = [&](int index, int for_consumer) {
    if (index >= shape.schedule.count) return;
    finish.arm_staging(shape.schedule.origin(index, rank), for_consumer);
  };
  if (consumer == 0 && threadIdx.x % kWarpgroup == 0) arm_staging(group, 0);
  const std::uint32_t my_turn = shared + Traits::kTurn + consumer * 8;
  const std::uint32_t next_turn = shared + Traits::kTurn + (1 - consumer) * 8;

  for (std::uint32_t round = consumer;; round += 2) {
    const int index = group + static_cast<int>(round) * num_groups;
    if (index >= shape.schedule.count) break;
    const TileOrigin origin = shape.schedule.origin(index, rank);
    finish.prefetch(origin);
    Accumulator acc;
    mbarrier_wait(my_turn, turn_parity(round));
    multiply<Traits>(acc, shared, {round * shape.k_blocks}, shape, consumer, next_turn);
    finish.run(acc, round);
    if (threadIdx.x % kWarpgroup == 0) {
      finish.store(origin);
      arm_staging(index + num_groups, 1 - consumer);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap map_a,
                     const __grid_constant__ CUtensorMap map_b,
                     const __grid_constant__ CUtensorMap map_out,
                     const __grid_constant__ CUtensorMap map_residual, const GemmArguments args) {
  DYNABERT_SHARED_MEMORY(shared_memory);
  const std::uint32_t shared = shared_address(shared_memory);
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
  const int rank = blockIdx.x % Traits::kGroup;
  const int group = blockIdx.x / Traits::kGroup;
  const int num_groups = gridDim.x / Traits::kGroup;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(shared + Traits::kFull + stage * 8, 1);
      mbarrier_init(shared + Traits::kEmpty + stage * 8, kWarpgroup / 32 * Traits::kCluster);
    }
    for (int consumer = 0; consumer < 2; ++consumer) {
      mbarrier_init(shared + Traits::kStagingFull + consumer * 8, 1);
      mbarrier_init(shared + Traits::kTurn + consumer * 8, kWarpgroup / 32);
    }
    mbarrier_init_fence();
    tma_prefetch(&map_a);
    tma_prefetch(&map_b);
    tma_prefetch(&map_out);
  }
  cluster_sync_initialised();
  // So far this block may have run beside the last blocks of the kernel before it, whose results it
  // reads from here on. The kernel after it may come as early: a multiprocessor holds one block,
  // so that its blocks start where this kernel's have ended.
  wait_for_previous_kernel();
  allow_next_kernel();
  TileEpilogue<Traits>::load_vectors(shared, args, rank);
  const GemmShape<Traits> shape(args);
  __syncthreads();

  if (warpgroup == 0) {
    give_up_registers<24>();
    if (threadIdx.x == 0) {
      produce<Traits>(shared, &map_a, &map_b, shape, group, num_groups, rank);
    }
  } else {
    take_registers<240>();
    consume<Traits>(shared, &map_out, &map_residual, args, shape, warpgroup - 1, group, num_groups,
                    rank);
  }
  // Another block may still multicast into this one's memory or arrive at its barriers.
  cluster_sync();
}

}  // namespace dynabert
