// The kernel of row_tiles.h: one block, which takes the sequences 256 at a time.

#include "launch.cuh"
#include "row_tiles.h"

namespace dynabert {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Of the sequences at hand. A run that goes on past them is cut there, which costs no more tiles
// than max_row_tiles allows for.
struct SharedRuns {
  std::int32_t begin[kThreads + 1];  // first row of each run; after the last, where it ends
  std::int32_t width[kThreads];
  std::int32_t tiles_to[kThreads];  // tiles of the runs up to and with this one
  std::int32_t warp_sums[kWarps];
};

// The sum over the threads up to and with this one; `total` over all. There is a barrier in it; two
// calls need another between them.
__device__ __forceinline__ std::int32_t inclusive_sum(std::int32_t value, std::int32_t* warp_sums,
                                                      std::int32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int32_t before = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  *total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) value += warp_sums[i];
    *total += warp_sums[i];
  }
  return value;
}

__device__ __forceinline__ std::int32_t clamped(std::int32_t value, std::int32_t limit) {
  return value < 0 ? 0 : value > limit ? limit : value;
}

__global__ void __launch_bounds__(kThreads)
    row_tiles_kernel(const std::int32_t* cu_seqlens, std::int32_t batch, const std::int32_t* each,
                     std::int32_t tokens, std::int32_t limit, std::int32_t tile_rows,
                     RowTile* table, std::int32_t entries) {
  DYNABERT_SHARED_MEMORY(shared);
  SharedRuns& runs = *reinterpret_cast<SharedRuns*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  std::int32_t written = 0;
  for (std::int32_t first = 0; first < batch; first += kThreads) {
    const std::int32_t sequence = first + thread;
    const bool exists = sequence < batch;
    const std::int32_t width = exists ? clamped(each[sequence], limit) : 0;
    const bool starts_run = exists && (thread == 0 || clamped(each[sequence - 1], limit) != width);
    std::int32_t num_runs;
    const std::int32_t run = inclusive_sum(starts_run, runs.warp_sums, &num_runs) - 1;
    if (starts_run) {
      runs.begin[run] = clamped(cu_seqlens[sequence], tokens);
      runs.width[run] = width;
    }
    if (thread == 0) {
      const std::int32_t last = batch - first < kThreads ? batch : first + kThreads;
      runs.begin[num_runs] = clamped(cu_seqlens[last], tokens);
    }
    __syncthreads();

    const std::int32_t rows = thread < num_runs ? runs.begin[thread + 1] - runs.begin[thread] : 0;
    std::int32_t num_tiles;
    runs.tiles_to[thread] =
        inclusive_sum(rows > 0 ? ceil_div(rows, tile_rows) : 0, runs.warp_sums, &num_tiles);
    __syncthreads();
    // Each thread finds the runs of its tiles, so that one long run is written by all of them.
    for (std::int32_t tile = thread; tile < num_tiles && written + tile < entries;
         tile += kThreads) {
      std::int32_t low = 0, high = num_runs - 1;
      while (low < high) {
        const std::int32_t middle = (low + high) / 2;
        if (runs.tiles_to[middle] > tile) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const std::int32_t before = low == 0 ? 0 : runs.tiles_to[low - 1];
      table[written + tile] = tile_of_run(runs.begin[low], runs.begin[low + 1], runs.width[low],
                                          tile - before, tile_rows);
    }
    written += num_tiles;
  }
  for (std::int32_t entry = written + thread; entry < entries; entry += kThreads) {
    table[entry] = {0, 0, 0};
  }
}

}  // namespace

cudaError_t build_row_tiles(const std::int32_t* cu_seqlens, std::int32_t batch,
                            const std::int32_t* each, std::int32_t tokens, std::int32_t limit,
                            std::int32_t tile_rows, RowTile* table, cudaStream_t stream) {
  if (batch < 0 || tokens < 0 || limit < 0 || tile_rows < 1) return cudaErrorInvalidValue;
  const std::int32_t entries = max_row_tiles(tokens, batch, tile_rows);
  if (entries == 0) return cudaSuccess;
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.block = dim3(kThreads);
  shape.shared_bytes = sizeof(SharedRuns);
  return launch_kernel(row_tiles_kernel, shape, stream, cu_seqlens, batch, each, tokens, limit,
                       tile_rows, table, entries);
}

}  // namespace dynabert
