// Single instructions against plain loops: which lane holds what, what a copy brings, who meets
// whom. On a Hopper card this tests the comments that kernels are written by; emulated, that the
// emulation follows the same comments.
//
// nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a instructions_test.cu -o
// instructions_test
// instructions_test [number of cases] [seed]

#include <cudaTypedefs.h>

#include <array>
#include <type_traits>

#include "../grid_barrier.cuh"
#include "../launch.cuh"
#include "../mbarrier.cuh"
#include "../mma.cuh"
#include "../tma.cuh"
#include "../wgmma.cuh"
#include "../wgmma_narrow.cuh"
#include "device_tensor.h"

using namespace dynabert;
using namespace dynabert::testing;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what);
}

// An array on the device, poisoned or a copy of one on the host.
template <typename T>
struct Array {
  T* device = nullptr;
  std::size_t size;

  explicit Array(std::size_t count) : size(count) {
    check(cudaMalloc(&device, size * sizeof(T)), "cudaMalloc");
    check(cudaMemset(device, 0xff, size * sizeof(T)), "cudaMemset");
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    check(cudaMemcpy(device, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(device); }

  std::vector<T> host() const {
    std::vector<T> values(size);
    check(cudaDeviceSynchronize(), "kernel");
    check(cudaMemcpy(values.data(), device, size * sizeof(T), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return values;
  }
};

// Small whole numbers: every product and sum of them is exact in every format here.
template <typename T>
std::vector<T> small_numbers(std::size_t size) {
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<float>(uniform(-4, 4));
  return values;
}

// 0, 1, 2, ...: a number tells where it came from.
std::vector<std::uint16_t> numbered(std::size_t size) {
  std::vector<std::uint16_t> values(size);
  for (std::size_t i = 0; i < size; ++i) values[i] = static_cast<std::uint16_t>(i);
  return values;
}

template <typename T>
__device__ std::uint32_t pair_at(const T* place) {
  return *reinterpret_cast<const std::uint32_t*>(place);
}

// A [16][16] row-major, B [8][16]: column n of the product's right side is row n.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma_m16n8k16<T>(d, pair_at(a + g * 16 + 2 * t), pair_at(a + (g + 8) * 16 + 2 * t),
                  pair_at(a + g * 16 + 2 * t + 8), pair_at(a + (g + 8) * 16 + 2 * t + 8),
                  pair_at(b + g * 16 + 2 * t), pair_at(b + g * 16 + 2 * t + 8));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <typename T>
void test_mma() {
  const auto a = small_numbers<T>(256), b = small_numbers<T>(128);
  const Array<T> device_a(a), device_b(b);
  const Array<float> out(128);
  check(launch_kernel(mma_kernel<T>, {.grid = 1, .block = 32}, nullptr, device_a.device,
                      device_b.device, out.device),
        "mma");
  const std::vector<float> got = out.host();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 1.0f;
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<float>(a[row * 16 + k]) * static_cast<float>(b[column * 16 + k]);
      }
      expect(got[row * 8 + column] == sum, "mma_m16n8k16");
    }
  }
}

// Four tiles of 8 x 8 to registers, registers back to memory, lane by lane.
__global__ void matrix_kernel(const uint4* in, std::uint32_t* rows, std::uint32_t* columns,
                              uint4* stored) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t lane = threadIdx.x, place = shared_address(memory) + lane * 16;
  store_shared(place, in[lane]);
  __syncwarp();
  std::uint32_t r[4], transposed[4];
  load_matrix_x4(r, place);
  load_matrix_transposed_x4(transposed, place);
  store_matrix_x4(place + 512, r);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    rows[lane * 4 + i] = r[i];
    columns[lane * 4 + i] = transposed[i];
  }
  stored[lane] = load_shared_uint4(place + 512);
}

void test_matrices() {
  const Array<std::uint16_t> in(numbered(256)), stored(256);
  const Array<std::uint32_t> rows(128), columns(128);
  check(launch_kernel(matrix_kernel, {.grid = 1, .block = 32, .shared_bytes = 1024}, nullptr,
                      reinterpret_cast<const uint4*>(in.device), rows.device, columns.device,
                      reinterpret_cast<uint4*>(stored.device)),
        "ldmatrix");
  const auto by_row = rows.host(), by_column = columns.host();
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    for (std::uint32_t tile = 0; tile < 4; ++tile) {
      const std::uint32_t first = tile * 64 + lane / 4 * 8 + lane % 4 * 2;
      expect(by_row[lane * 4 + tile] == (first | (first + 1) << 16), "load_matrix_x4");
      const std::uint32_t top = tile * 64 + lane % 4 * 2 * 8 + lane / 4;
      expect(by_column[lane * 4 + tile] == (top | (top + 8) << 16), "load_matrix_transposed_x4");
    }
  }
  expect(stored.host() == numbered(256), "store_matrix_x4");
}

__global__ void shuffle_kernel(int* out) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x;
  int* const mine = out + lane * 4;
  mine[0] = __shfl_xor_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 11, 8);
  mine[2] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : __shfl_sync(0xffff0000u, lane, 20);
  mine[3] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
}

void test_shuffles() {
  const Array<int> out(128);
  check(launch_kernel(shuffle_kernel, {.grid = 1, .block = 32}, nullptr, out.device), "shuffle");
  const auto got = out.host();
  int thirds = 0;
  for (int lane = 0; lane < 32; lane += 3) thirds |= 1 << lane;
  for (int lane = 0; lane < 32; ++lane) {
    expect(got[lane * 4] == (lane ^ 5), "__shfl_xor_sync");
    expect(got[lane * 4 + 1] == lane / 8 * 8 + 3, "__shfl_sync within 8 lanes");
    expect(got[lane * 4 + 2] == (lane < 16 ? lane ^ 1 : 20), "shuffles of half a warp");
    expect(got[lane * 4 + 3] == thirds, "__ballot_sync");
  }
}

// Two groups of copies in flight, each thread 16 bytes of each, the second cut short.
__global__ void copy_kernel(const uint4* in, uint4* out, unsigned valid_bytes) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t place = shared_address(memory) + threadIdx.x * 16;
  const std::uint32_t half = blockDim.x * 16;
  copy_async_16(place, in + threadIdx.x);
  copy_async_commit();
  copy_async_zfill_16(place + half, in + blockDim.x + threadIdx.x, valid_bytes);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  const std::uint32_t other = shared_address(memory) + (blockDim.x - 1 - threadIdx.x) * 16;
  out[threadIdx.x] = load_shared_uint4(other);
  copy_async_wait<0>();
  __syncthreads();
  out[blockDim.x + threadIdx.x] = load_shared_uint4(other + half);
}

void test_copies() {
  const int threads = 32 * uniform(1, 8);
  const auto valid = static_cast<unsigned>(2 * uniform(0, 8));
  const Array<std::uint16_t> in(numbered(threads * 16)), out(threads * 16);
  check(launch_kernel(copy_kernel,
                      {.grid = 1,
                       .block = dim3(threads),
                       .shared_bytes = static_cast<std::size_t>(threads) * 32},
                      nullptr, reinterpret_cast<const uint4*>(in.device),
                      reinterpret_cast<uint4*>(out.device), valid),
        "cp.async");
  const auto got = out.host();
  for (int i = 0; i < threads * 16; ++i) {
    const int half = i / (threads * 8), thread = threads - 1 - i / 8 % threads;
    const bool kept = half == 0 || i % 8 * 2 < static_cast<int>(valid);
    expect(got[i] == (kept ? half * threads * 8 + thread * 8 + i % 8 : 0), "cp.async");
  }
}

CUtensorMap encode(const void* data, std::array<cuuint64_t, 3> dims,
                   std::array<cuuint64_t, 2> strides, std::array<cuuint32_t, 3> box, int rank) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
  CUtensorMap map = {};
  const cuuint32_t unit[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data), dims.data(),
      strides.data(), box.data(), unit, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  expect(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled");
  return map;
}

constexpr int kBoxRows = 16, kBoxBytes = kBoxRows * 128;

// Both blocks of a cluster get two boxes: block 0 loads the first for both, each the second for
// itself. Then block 0 stores its first box.
__global__ void box_kernel(const __grid_constant__ CUtensorMap in,
                           const __grid_constant__ CUtensorMap deep,
                           const __grid_constant__ CUtensorMap out, uint4* seen, int x, int y,
                           int z) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t shared = shared_address(memory), barrier = shared + 2 * kBoxBytes;
  const std::uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  cluster_sync_initialised();
  // Three phases of the barrier; the last brings what is looked at.
  for (int round = 2; round >= 0; --round) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, 2 * kBoxBytes);
      if (rank == 0) tma_load_multicast(shared, &in, barrier, 3, x, y + round);
      tma_load(shared + kBoxBytes, &deep, barrier, 0, y + round, z);
    }
    mbarrier_wait(barrier, round & 1);
    cluster_sync();
  }
  for (int i = threadIdx.x; i < 2 * kBoxBytes / 16; i += blockDim.x) {
    seen[rank * (2 * kBoxBytes / 16) + i] = load_shared_uint4(shared + i * 16);
  }
  if (rank == 0 && threadIdx.x == 0) {
    tma_store(&out, shared, x, y);
    tma_store_commit();
    tma_store_wait_read();
  }
  cluster_sync();
}

void test_boxes() {
  const int rows = uniform(kBoxRows, 40), columns = 64 * uniform(1, 3);
  const int x = 8 * uniform(0, columns / 8 - 1), y = uniform(0, rows - 1);
  const int z = uniform(0, columns / 64 - 1);
  const Array<std::uint16_t> in(numbered(rows * columns)), out(rows * columns);
  const Array<std::uint16_t> seen(2 * kBoxBytes);
  const std::array<cuuint64_t, 3> dims = {static_cast<cuuint64_t>(columns),
                                          static_cast<cuuint64_t>(rows), 1};
  const std::array<cuuint64_t, 2> strides = {static_cast<cuuint64_t>(columns) * 2, 128};
  const std::array<cuuint64_t, 3> panels = {64, dims[1], dims[0] / 64};
  check(launch_kernel(box_kernel,
                      {.grid = 2, .block = 64, .shared_bytes = 2 * kBoxBytes + 8, .cluster = 2},
                      nullptr, encode(in.device, dims, strides, {64, kBoxRows, 1}, 2),
                      encode(in.device, panels, strides, {64, kBoxRows, 1}, 3),
                      encode(out.device, dims, strides, {64, kBoxRows, 1}, 2),
                      reinterpret_cast<uint4*>(seen.device), x, y, z),
        "box");
  const auto got = seen.host(), written = out.host();
  for (int i = 0; i < 2 * kBoxBytes; ++i) {
    const bool deep = i / (kBoxBytes / 2) % 2;
    const int place = i % (kBoxBytes / 2), row = place / 64;
    // 16-byte piece p of row r lies at p ^ r % 8.
    const int column = ((place % 64 / 8) ^ (row % 8)) * 8 + place % 8;
    const int from_row = y + row, from_column = deep ? z * 64 + column : x + column;
    const bool inside = from_row < rows && from_column < columns;
    expect(got[i] == (inside ? from_row * columns + from_column : 0), "tma_load");
  }
  for (int i = 0; i < rows * columns; ++i) {
    const int row = i / columns - y, column = i % columns - x;
    const bool inside = row >= 0 && row < kBoxRows && column >= 0 && column < 64;
    expect(written[i] == (inside ? i : 0xffff), "tma_store");
  }
}

// D[64, N] = A[64, 64] @ B[64, N] + A @ B: two passes over K. The operands lie in memory as
// wgmma.cuh and wgmma_narrow.cuh say; the host put them so.
template <int kColumns, bool kTransposeB, bool kNarrow>
__global__ void __launch_bounds__(128)
    product_kernel(const uint4* operands, float* out, int bytes_a, int bytes_b) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t shared = shared_address(memory);
  for (int i = threadIdx.x; i < (bytes_a + bytes_b) / 16; i += 128) {
    store_shared(shared + i * 16, operands[i]);
  }
  fence_async_proxy();
  __syncthreads();
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 0.0f;
  const std::uint64_t a = wgmma_descriptor(shared, 16, 1024);
  // Transposed: 64 columns or, narrow, 16 are a panel of 64 K values.
  const std::uint64_t b = !kTransposeB ? wgmma_descriptor(shared + bytes_a, 16, 1024)
                          : kNarrow    ? wgmma_descriptor_32(shared + bytes_a, 64 * 32)
                                       : wgmma_descriptor(shared + bytes_a, 64 * 128, 1024);
  constexpr int kStep = !kTransposeB ? 32 : kNarrow ? 512 : 2048;
  pin_registers(d);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const std::uint64_t step_a = wgmma_advance(a, step % 4 * 32);
    const std::uint64_t step_b = wgmma_advance(b, step % 4 * kStep);
    if constexpr (kNarrow) {
      NarrowWgmma<kColumns>::template run<kTransposeB>(d, step_a, step_b, step > 0);
    } else {
      wgmma_m64n192k16<kTransposeB>(d, step_a, step_b, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(d);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    out[(row + i / 2 % 2 * 8) * kColumns + column + i / 4 * 8 + i % 2] = d[i];
  }
}

template <int kColumns, bool kTransposeB, bool kNarrow>
void test_product() {
  const auto a = small_numbers<__nv_bfloat16>(64 * 64);        // [row][k]
  const auto b = small_numbers<__nv_bfloat16>(kColumns * 64);  // [column][k]
  // Rows of `line` bytes; 16-byte pieces are mixed by bits 7 and up of the place.
  const auto mixed = [](int place, int line) {
    return place ^ (place >> 7 & (line / 16 - 1)) << 4;
  };
  std::vector<__nv_bfloat16> operands(64 * 64 + kColumns * 64);
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 64; ++k) operands[mixed(row * 128 + k * 2, 128) / 2] = a[row * 64 + k];
  }
  constexpr int kPanel = kNarrow ? 16 : 64;  // columns
  for (int column = 0; column < kColumns; ++column) {
    for (int k = 0; k < 64; ++k) {
      const int place =
          kTransposeB
              ? mixed(column / kPanel * 64 * kPanel * 2 + k * kPanel * 2 + column % kPanel * 2,
                      kPanel * 2)
              : mixed(column * 128 + k * 2, 128);
      operands[64 * 64 + place / 2] = b[column * 64 + k];
    }
  }
  const Array<__nv_bfloat16> device_operands(operands);
  const Array<float> out(64 * kColumns);
  check(launch_kernel(product_kernel<kColumns, kTransposeB, kNarrow>,
                      {.grid = 1, .block = 128, .shared_bytes = operands.size() * 2}, nullptr,
                      reinterpret_cast<const uint4*>(device_operands.device), out.device,
                      64 * 64 * 2, kColumns * 64 * 2),
        "wgmma");
  const auto got = out.host();
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < 64; ++k) {
        sum += static_cast<float>(a[row * 64 + k]) * static_cast<float>(b[column * 64 + k]);
      }
      expect(got[row * kColumns + column] == 2 * sum, "wgmma");
    }
  }
}

// In every round each block adds up what all blocks of the grid wrote, then what the blocks of its
// cluster hold.
__global__ void grid_kernel(unsigned long long* counter, std::uint32_t* slots, std::uint32_t* out,
                            int rounds) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t mine = shared_address(memory);
  GridBarrier barrier;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      slots[blockIdx.x] = blockIdx.x * (round + 1);
      barrier.arrive(counter, gridDim.x);
      barrier.wait(counter);
      std::uint32_t sum = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) {
        sum += static_cast<const volatile std::uint32_t*>(slots)[block];
      }
      store_shared(mine, sum + blockIdx.x);
      store_shared(mine + 4, 0u);
      // The sums are read before the next round's are written.
      barrier.arrive(counter, gridDim.x);
      barrier.wait(counter);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    const uint2 neighbour = cluster_load(cluster_address(mine, cluster_rank() ^ 1));
    if (threadIdx.x == 0) out[round * gridDim.x + blockIdx.x] = neighbour.x;
    cluster_arrive();
    cluster_wait();
  }
}

void test_grid() {
  const int blocks = 2 * uniform(1, multiprocessors() / 2), rounds = uniform(1, 4);
  const Array<unsigned long long> counter(std::vector<unsigned long long>(1, 0));
  const Array<std::uint32_t> slots(blocks), out(blocks * rounds);
  for (int launch = 0; launch < 2; ++launch) {
    check(launch_kernel(grid_kernel,
                        {.grid = dim3(blocks),
                         .block = 64,
                         .shared_bytes = 16,
                         .cluster = 2,
                         .cooperative = true},
                        nullptr, counter.device, slots.device, out.device, rounds),
          "grid");
    const auto got = out.host();
    for (int i = 0; i < blocks * rounds; ++i) {
      const int all = blocks * (blocks - 1) / 2 * (i / blocks + 1);
      expect(got[i] == static_cast<std::uint32_t>(all + (i % blocks ^ 1)), "grid and cluster");
    }
  }
}

void run_case() {
  test_mma<__nv_bfloat16>();
  test_mma<__half>();
  test_matrices();
  test_shuffles();
  test_copies();
  test_boxes();
  test_product<192, false, false>();
  test_product<192, true, false>();
  test_product<8, false, true>();
  test_product<72, false, true>();
  test_product<128, false, true>();
  test_product<16, true, true>();
  test_product<112, true, true>();
  test_grid();
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 20;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  for (int i = 0; i < cases; ++i) run_case();
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures != 0;
}
