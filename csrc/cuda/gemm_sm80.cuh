// The kernel of gemm_sm80.h, and its launcher for one element type.
//
// A block computes one tile of the output. Its four warps copy blocks of K into a ring of shared
// memory, several ahead of the products (cp.async); a warp loads the fragments of the next step
// from there while it multiplies those of the current one. The finished tile goes through shared
// memory once more, so that it leaves in pieces of 16 bytes along the rows.
//
//   rows     x [T, K], weight [N, K]     both K-major; K is the hidden size, N the width
//   columns  x [T, K], weight [K, N]     the weight's fragments are transposed on the way;
//                                        K is the width, N the hidden size

#pragma once

#include "activation.cuh"
#include "gemm_sm80.h"
#include "gemm_sm80_schedule.h"
#include "launch.cuh"
#include "mma.cuh"

namespace dynabert {

enum class GemmForm { kRows, kColumns };

inline constexpr int kGemmSm80Threads = 128;

template <typename Element, GemmForm form, int tile>
struct GemmSm80Traits {
  using T = Element;
  static constexpr GemmForm kForm = form;
  static constexpr GemmTile kTile = kGemmTiles[tile];
  static constexpr int kWarpRows = kTile.rows / 2;
  static constexpr int kWarpColumns = kTile.columns / 2;
  static constexpr int kSteps = kTile.depth / 16;  // of products in a block of K
  static constexpr int kWeightRowBytes =
      2 * (kForm == GemmForm::kRows ? kTile.depth : kTile.columns);
  static constexpr int kXBytes = kTile.rows * kTile.depth * 2;
  static constexpr int kStageBytes = kXBytes + kTile.columns * kTile.depth * 2;
  static constexpr int kBiasOffset = kTile.stages * kStageBytes;
  static constexpr int kSharedBytes = kBiasOffset + kTile.columns * 4;
  static_assert(kSteps % 2 == 0, "the fragments of a block start in the first buffer");
  static_assert(kTile.rows * kTile.columns * 2 <= kBiasOffset, "the output is staged in the ring");
  static_assert(2 * (kSharedBytes + 1024) <= 100 * 1024, "two blocks share a multiprocessor");
};

// Copies tiles [kRows, kColumns] of a row-major matrix to shared memory, one after the other along
// the columns, or along the rows. What lies outside the matrix becomes zero and is not read.
template <int kRows, int kColumns, bool kAlongRows>
struct TileLoader {
  static constexpr int kChunks = kColumns / 8;  // of 16 bytes, in a row
  static constexpr int kRowStep = kGemmSm80Threads / kChunks;
  static_assert(kRows % kRowStep == 0 && kRowStep % kSwizzlePeriod == 0);

  const unsigned char* source;  // this thread's first chunk
  std::int64_t step;            // bytes to its next in the tile
  std::int64_t advance;         // bytes to the next tile
  std::int32_t rows;            // of the matrix from there on
  std::int32_t columns;
  std::uint32_t offset;  // of the chunk in shared memory

  // `matrix` is the first element of the first tile, `rows` and `columns` what is valid from there.
  __device__ __forceinline__ TileLoader(const void* matrix, std::int64_t stride, std::int32_t rows,
                                        std::int32_t columns) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    source = static_cast<const unsigned char*>(matrix) + (row * stride + chunk * 8) * 2;
    step = kRowStep * stride * 2;
    advance = kAlongRows ? kRows * stride * 2 : kColumns * 2;
    this->rows = rows - row;
    this->columns = columns - chunk * 8;
    offset = swizzled<kColumns * 2>(row, chunk);
  }

  __device__ __forceinline__ void load(std::uint32_t tile) {
    const std::int32_t valid = columns >= 8 ? 16 : columns > 0 ? columns * 2 : 0;
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      copy_async_zfill_16(tile + offset + i * kRowStep * kColumns * 2, source + i * step,
                          i * kRowStep < rows ? valid : 0);
    }
    source += advance;
    (kAlongRows ? rows : columns) -= kAlongRows ? kRows : kColumns;
  }
};

// The part of the output that a block computes.
struct OutputTile {
  std::int32_t row;     // first row, and how many of the tile's are in use
  std::int32_t rows;    // 0: nothing to do
  std::int32_t column;  // first column, and how many are left from there
  std::int32_t columns;
  std::int32_t width;  // rows of the weight in use
};

template <class Traits>
__device__ __forceinline__ OutputTile output_tile(const GemmSm80& args) {
  constexpr GemmTile kTile = Traits::kTile;
  constexpr bool kRowsForm = Traits::kForm == GemmForm::kRows;
  const auto rows_of = [&](std::int32_t count) {
    return rows_in_use(count, args.width.unit, args.full_width);
  };
  const auto across = [](std::int32_t columns) { return ceil_div(columns, Traits::kTile.columns); };
  const std::int32_t index = static_cast<std::int32_t>(blockIdx.x);

  if (args.tiles != nullptr) {
    const std::int32_t widest = kRowsForm ? args.full_width : args.hidden_size;
    const auto position = BandedOrder{args.num_tiles, across(widest)}.position(index);
    const RowTile tile = args.tiles[position.row_tile];
    const std::int32_t width = rows_of(tile.width), column = position.column_tile * kTile.columns;
    const std::int32_t left = (kRowsForm ? width : args.hidden_size) - column;
    return {tile.begin, left > 0 ? tile.end - tile.begin : 0, column, left, width};
  }
  // The grid has room for the widest; the blocks are those of the width at hand, and the last ones
  // find nothing to do.
  const std::int32_t* const device_count = args.width.device_count;
  const std::int32_t width = rows_of(device_count != nullptr ? *device_count : args.width.count);
  const std::int32_t columns = kRowsForm ? width : args.hidden_size;
  const BandedOrder order = {ceil_div(args.tokens, kTile.rows), across(columns)};
  if (index >= order.count()) return {};
  const auto position = order.position(index);
  const std::int32_t row = position.row_tile * kTile.rows;
  const std::int32_t column = position.column_tile * kTile.columns;
  const std::int32_t left = args.tokens - row;
  return {row, left < kTile.rows ? left : kTile.rows, column, columns - column, width};
}

// What a warp multiplies in one step of 16 along K.
template <class Traits>
struct Fragments {
  std::uint32_t x[Traits::kWarpRows / 16][4];
  std::uint32_t weight[Traits::kWarpColumns / 16][4];  // two tiles of 8 columns each
};

// Where this lane's rows of the fragments begin in a stage.
template <class Traits>
struct FragmentLoader {
  static constexpr bool kRowsForm = Traits::kForm == GemmForm::kRows;

  int x_row, x_chunk, weight_row, weight_chunk;

  __device__ __forceinline__ FragmentLoader(int warp_row, int warp_column) {
    const int lane = threadIdx.x % 32;
    x_row = warp_row + lane % 16;
    x_chunk = lane / 16;
    weight_row = kRowsForm ? warp_column + lane / 16 * 8 + lane % 8 : lane % 16;
    weight_chunk = kRowsForm ? lane / 8 % 2 : warp_column / 8 + lane / 16;
  }

  // Chunks and steps are combined by `|`: their bits do not meet, so what depends on the lane is
  // computed once.
  __device__ __forceinline__ void load(Fragments<Traits>& to, std::uint32_t stage, int step) const {
    constexpr int kXRowBytes = Traits::kTile.depth * 2;
    constexpr int kWeightRowBytes = Traits::kWeightRowBytes;
    const std::uint32_t x = stage + swizzled<kXRowBytes>(x_row, x_chunk | step * 2);
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
      load_matrix_x4(to.x[i], x + i * 16 * kXRowBytes);
    }
    const std::uint32_t weight = stage + Traits::kXBytes;
#pragma unroll
    for (int i = 0; i < Traits::kWarpColumns / 16; ++i) {
      if constexpr (kRowsForm) {
        load_matrix_x4(to.weight[i],
                       weight + swizzled<kWeightRowBytes>(weight_row, weight_chunk | step * 2) +
                           i * 16 * kWeightRowBytes);
      } else {
        load_matrix_transposed_x4(to.weight[i],
                                  weight + step * 16 * kWeightRowBytes +
                                      swizzled<kWeightRowBytes>(weight_row, weight_chunk | i * 2));
      }
    }
  }
};

template <class Traits>
using Sums = float[Traits::kWarpRows / 16][Traits::kWarpColumns / 8][4];

template <class Traits>
__device__ __forceinline__ void multiply(Sums<Traits>& sums, const Fragments<Traits>& f) {
#pragma unroll
  for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Traits::kWarpColumns / 8; ++j) {
      mma_m16n8k16<typename Traits::T>(sums[i][j], f.x[i][0], f.x[i][1], f.x[i][2], f.x[i][3],
                                       f.weight[j / 2][j % 2 * 2], f.weight[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Adds the bias, applies the activation, and leaves the rounded tile in shared memory.
template <class Traits, Activation kActivation>
__device__ __forceinline__ void stage_output(const Sums<Traits>& sums, std::uint32_t out,
                                             std::uint32_t bias, int warp_row, int warp_column) {
  constexpr int kRowBytes = Traits::kTile.columns * 2;
  const int row = warp_row + threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < Traits::kWarpColumns / 8; ++j) {
    const int column = warp_column + j * 8;
    const float2 b = load_shared_pair(bias + (column + pair * 2) * 4);
    const std::uint32_t first = out + swizzled<kRowBytes>(row, column / 8) + pair * 4;
#pragma unroll
    for (int i = 0; i < Traits::kWarpRows / 16; ++i) {
      const auto& d = sums[i][j];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_shared(first + (i * 16 + half * 8) * kRowBytes,
                     pack2<typename Traits::T>(activate<kActivation>(d[half * 2] + b.x),
                                               activate<kActivation>(d[half * 2 + 1] + b.y)));
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void write_output(const GemmSm80& args, const OutputTile& tile,
                                             std::uint32_t staged) {
  using T = typename Traits::T;
  constexpr int kChunks = Traits::kTile.columns / 8;
  constexpr int kRowStep = kGemmSm80Threads / kChunks;
  static_assert(kRowStep % kSwizzlePeriod == 0);
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const std::uint32_t from = staged + swizzled<kChunks * 16>(first, chunk);
  T* out =
      static_cast<T*>(args.out) + (tile.row + first) * args.out_stride + tile.column + chunk * 8;
  const std::int32_t columns = tile.columns - chunk * 8;
#pragma unroll
  for (int i = 0; i < Traits::kTile.rows / kRowStep; ++i) {
    if (first + i * kRowStep >= tile.rows) break;
    const uint4 v = load_shared_uint4(from + i * kRowStep * kChunks * 16);
    if (columns >= 8) {
      *reinterpret_cast<uint4*>(out) = v;
    } else {
      const std::uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e >= columns) continue;
        reinterpret_cast<std::uint16_t*>(out)[e] =
            static_cast<std::uint16_t>(words[e / 2] >> e % 2 * 16);
      }
    }
    out += kRowStep * args.out_stride;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kGemmSm80Threads, Traits::kTile.blocks)
    gemm_sm80_kernel(const GemmSm80 args) {
  DYNABERT_SHARED_MEMORY(shared);
  using T = typename Traits::T;
  constexpr GemmTile kTile = Traits::kTile;
  constexpr bool kRowsForm = Traits::kForm == GemmForm::kRows;
  const OutputTile tile = output_tile<Traits>(args);
  if (tile.rows <= 0) return;

  const std::uint32_t ring = shared_address(shared);
  const std::uint32_t bias = ring + Traits::kBiasOffset;
  if (threadIdx.x < kTile.columns) {
    const std::int32_t column = static_cast<std::int32_t>(threadIdx.x);
    const T* const values = static_cast<const T*>(args.bias) + tile.column;
    store_shared(bias + column * 4,
                 column < tile.columns ? static_cast<float>(values[column]) : 0.0f);
  }

  const std::int32_t depth = kRowsForm ? args.hidden_size : tile.width;
  const T* const weight = static_cast<const T*>(args.weight) +
                          (kRowsForm ? tile.column * std::int64_t{args.hidden_size} : tile.column);
  TileLoader<kTile.rows, kTile.depth, false> load_x(
      static_cast<const T*>(args.x) + tile.row * args.x_stride, args.x_stride, tile.rows, depth);
  TileLoader<kRowsForm ? kTile.columns : kTile.depth, kRowsForm ? kTile.depth : kTile.columns,
             !kRowsForm>
      load_weight(weight, args.hidden_size, kRowsForm ? tile.columns : depth,
                  kRowsForm ? depth : tile.columns);
  const std::int32_t blocks = ceil_div(depth, kTile.depth);

  // One group of copies per block of K, empty past the last, so that counting groups is counting
  // blocks.
  std::int32_t loaded = 0;
  std::uint32_t stage_in = ring;
  const std::uint32_t ring_end = ring + kTile.stages * Traits::kStageBytes;
  const auto next = [&](std::uint32_t stage) {
    stage += Traits::kStageBytes;
    return stage == ring_end ? ring : stage;
  };
  const auto load_block = [&] {
    if (loaded < blocks) {
      load_x.load(stage_in);
      load_weight.load(stage_in + Traits::kXBytes);
    }
    copy_async_commit();
    ++loaded;
    stage_in = next(stage_in);
  };
#pragma unroll
  for (int i = 0; i < kTile.stages - 1; ++i) load_block();

  const int warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * Traits::kWarpRows;
  const int warp_column = warp % 2 * Traits::kWarpColumns;
  const FragmentLoader<Traits> fragments(warp_row, warp_column);
  Fragments<Traits> buffer[2];
  Sums<Traits> sums = {};
  copy_async_wait<kTile.stages - 2>();
  __syncthreads();
  std::uint32_t stage = ring;
  if (blocks > 0) fragments.load(buffer[0], stage, 0);
  for (std::int32_t block = 0; block < blocks; ++block) {
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      if (step + 1 < Traits::kSteps) {
        fragments.load(buffer[(step + 1) % 2], stage, step + 1);
      } else {
        // All warps have loaded the last fragments of this block, and the next has arrived.
        copy_async_wait<kTile.stages - 2>();
        __syncthreads();
        stage = next(stage);
        if (block + 1 < blocks) fragments.load(buffer[0], stage, 0);
      }
      // Into the stage of the block before this one, which the last barrier has freed.
      if (step == 0) load_block();
      multiply<Traits>(sums, buffer[step % 2]);
    }
  }

  // No copy with anything in it is on its way, and the barrier of the last block has passed.
  const auto stage_as = [&]<Activation kActivation>() {
    stage_output<Traits, kActivation>(sums, ring, bias, warp_row, warp_column);
  };
  switch (kRowsForm ? args.activation : Activation::kNone) {
    case Activation::kNone:
      stage_as.template operator()<Activation::kNone>();
      break;
    case Activation::kGelu:
      stage_as.template operator()<Activation::kGelu>();
      break;
    case Activation::kGeluTanh:
      stage_as.template operator()<Activation::kGeluTanh>();
      break;
    case Activation::kRelu:
      stage_as.template operator()<Activation::kRelu>();
      break;
  }
  __syncthreads();
  write_output<Traits>(args, tile, ring);
}

template <typename T, GemmForm kForm, int kTileIndex>
cudaError_t launch_gemm_sm80_tile(const GemmSm80& args, cudaStream_t stream) {
  using Traits = GemmSm80Traits<T, kForm, kTileIndex>;
  constexpr GemmTile kTile = Traits::kTile;
  const std::int32_t columns = kForm == GemmForm::kRows ? args.full_width : args.hidden_size;
  const BandedOrder order = {
      args.tiles != nullptr ? args.num_tiles : ceil_div(args.tokens, kTile.rows),
      ceil_div(columns, kTile.columns)};
  if (order.count() > INT32_MAX) return cudaErrorInvalidValue;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(order.count()));
  shape.block = dim3(kGemmSm80Threads);
  shape.shared_bytes = Traits::kSharedBytes;
  return launch_kernel(gemm_sm80_kernel<Traits>, shape, stream, args);
}

template <typename T, GemmForm kForm>
cudaError_t launch_gemm_sm80(const GemmSm80& args, cudaStream_t stream) {
  const std::int32_t columns = kForm == GemmForm::kRows ? args.full_width : args.hidden_size;
  static_assert(kGemmTileCount == 3);
  switch (choose_gemm_tile(args.tokens, columns, multiprocessors(), args.tile_rows)) {
    case 0:
      return launch_gemm_sm80_tile<T, kForm, 0>(args, stream);
    case 1:
      return launch_gemm_sm80_tile<T, kForm, 1>(args, stream);
    default:
      return launch_gemm_sm80_tile<T, kForm, 2>(args, stream);
  }
}

}  // namespace dynabert
