// What the emulation is there to see: each fault that a kernel may have, made on purpose, ends the
// program with a message or shows in the numbers; the same kernel without the fault passes. Only
// emulated; instructions_test.cu has what also holds on a card.
//
// g++ -std=c++20 -O1 -x c++ -I/usr/local/cuda/include emulation_test.cu && ./a.out [cases] [seed]

#ifdef __CUDACC__

int main() { return 0; }

#else

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../launch.cuh"
#include "../mbarrier.cuh"
#include "../mma.cuh"
#include "../wgmma.cuh"

using namespace dynabert;

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAIL %s\n", what.c_str());
}

// Device memory for a kernel to fill.
template <typename T>
struct Array {
  T* data = nullptr;
  std::size_t size;
  explicit Array(std::size_t count) : size(count) { cudaMalloc(&data, size * sizeof(T)); }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
};

// What `faulty` writes to stderr before it aborts, in a process of its own; empty if it returns.
std::string message_of(const std::function<void()>& faulty) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    faulty();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t got = 0; (got = read(ends[0], buffer, sizeof(buffer))) > 0;) {
    text.append(buffer, static_cast<std::size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
  return aborted ? text : "";
}

void expect_message(const char* what, std::vector<const char*> parts,
                    const std::function<void()>& faulty) {
  const std::string text = message_of(faulty);
  for (const char* part : parts) {
    expect(text.find(part) != std::string::npos,
           std::string(what) + ": no \"" + part + "\" in \"" + text + "\"");
  }
}

void run(void (*kernel)(float*, int), int fault, float* out, unsigned threads,
         std::size_t shared_bytes = 4096) {
  const LaunchShape shape = {.grid = 1, .block = threads, .shared_bytes = shared_bytes};
  if (launch_kernel(kernel, shape, nullptr, out, fault) != cudaSuccess) std::exit(1);
}

// How many of `launches` give other numbers than 0, 1, 2, ...
int wrong_launches(void (*kernel)(float*, int), int fault, int launches) {
  constexpr unsigned kThreads = 128;
  const Array<float> out(kThreads);
  int wrong = 0;
  for (int launch = 0; launch < launches; ++launch) {
    run(kernel, fault, out.data, kThreads);
    bool right = true;
    for (unsigned i = 0; i < kThreads; ++i) right = right && out.data[i] == static_cast<float>(i);
    wrong += !right;
  }
  return wrong;
}

// Each of these leaves out[i] = i, unless the barrier or wait is left out that `fault` names.

void reverse_kernel(float* out, int fault) {
  DYNABERT_SHARED_MEMORY(memory);
  float* const values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = static_cast<float>(blockDim.x - 1 - threadIdx.x);
  if (!fault) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

void warp_reverse_kernel(float* out, int fault) {
  DYNABERT_SHARED_MEMORY(memory);
  float* const values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!fault) __syncwarp();
  out[threadIdx.x ^ 31] = values[threadIdx.x ^ 31];
}

void copy_kernel(float* out, int fault) {
  DYNABERT_SHARED_MEMORY(memory);
  out[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < 32)
    copy_async_16(shared_address(memory) + threadIdx.x * 16, out + threadIdx.x * 4);
  copy_async_commit();
  if (fault == 0) copy_async_wait<0>();
  if (fault == 1) copy_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

// Each warp hands a value to the next through one place: a second barrier keeps it until read.
void relay_kernel(float* out, int fault) {
  DYNABERT_SHARED_MEMORY(memory);
  float* const place = reinterpret_cast<float*>(memory);
  for (unsigned turn = 0; turn < blockDim.x; ++turn) {
    if (threadIdx.x == turn) *place = static_cast<float>(turn);
    __syncthreads();
    if (threadIdx.x == (turn + 64) % blockDim.x) out[turn] = *place;
    if (!fault) __syncthreads();
  }
}

// Two stages of operands, refilled while the products of the other are under way.
void product_kernel(float* out, int fault) {
  DYNABERT_SHARED_MEMORY(memory);
  const std::uint32_t shared = shared_address(memory);
  constexpr std::uint32_t kBytesA = 64 * 128, kBytesB = 192 * 128;
  float d[96] = {};
  const auto fill = [&](int round) {
    // A is zero but for its first column of ones, B but for its first row: n, in two of the rounds.
    unsigned char* const stage = memory + round % 2 * (kBytesA + kBytesB);
    for (unsigned i = threadIdx.x; i < kBytesA + kBytesB; i += 128) stage[i] = 0;
    __syncthreads();
    const auto put = [](unsigned char* to, float value) {
      const __nv_bfloat16 rounded = __float2bfloat16(value);
      std::memcpy(to, &rounded, 2);
    };
    if (threadIdx.x < 64) put(stage + threadIdx.x * 128 + threadIdx.x % 8 * 16, 1.0f);
    if (threadIdx.x < 128) {
      put(stage + kBytesA + threadIdx.x * 128 + threadIdx.x % 8 * 16,
          round % 3 == 0 ? static_cast<float>(threadIdx.x) : 0.0f);
    }
    fence_async_proxy();
    __syncthreads();
  };
  for (int round = 0; round < 4; ++round) {
    fill(round);
    const std::uint32_t stage = shared + round % 2 * (kBytesA + kBytesB);
    wgmma_fence();
    wgmma_m64n192k16<false>(d, wgmma_descriptor(stage, 16, 1024),
                            wgmma_descriptor(stage + kBytesA, 16, 1024), 1);
    wgmma_commit();
    if (fault != 1) wgmma_wait<1>();
    __syncthreads();
  }
  if (fault != 2) wgmma_wait<0>();
  // Row 0 has the sums 2 * n, shared among four lanes.
  if (threadIdx.x < 4) {
    for (int j = 0; j < 16; ++j) {
      for (int i = 0; i < 2; ++i) out[8 * j + 2 * threadIdx.x + i] = d[4 * j + i] / 2.0f;
    }
  }
  wgmma_wait<0>();
}

void test_missing_barriers(int launches) {
  const auto test = [launches](const char* what, void (*kernel)(float*, int),
                               std::vector<int> faults) {
    expect(wrong_launches(kernel, 0, launches) == 0, what + std::string(": wrong without a fault"));
    for (const int fault : faults) {
      expect(wrong_launches(kernel, fault, launches) > 0,
             what + std::string(" is not missed: ") + std::to_string(fault));
    }
  };
  test("__syncthreads", reverse_kernel, {1});
  test("__syncwarp", warp_reverse_kernel, {1});
  test("__syncthreads after reading", relay_kernel, {1});
  test("copy_async_wait", copy_kernel, {1, 2});
}

void test_missing_product_wait(int launches) {
  constexpr std::size_t kBytes = 2 * (64 + 192) * 128;
  const Array<float> out(128);
  for (int fault = 0; fault < 3; ++fault) {
    int wrong = 0;
    for (int launch = 0; launch < launches; ++launch) {
      run(product_kernel, fault, out.data, 128, kBytes);
      bool right = true;
      for (int i = 0; i < 128; ++i) right = right && out.data[i] == static_cast<float>(i);
      wrong += !right;
    }
    expect((wrong > 0) == (fault > 0), "wgmma_wait: fault " + std::to_string(fault));
  }
}

void test_accesses() {
  static float* const global = [] {
    float* memory = nullptr;
    cudaMalloc(&memory, 100 * sizeof(float));
    return memory;
  }();
  using Kernel = void (*)(float*, int);
  const auto fails = [](const char* what, std::vector<const char*> parts, Kernel kernel) {
    parts.push_back("block (0, 0, 0) thread (");
    expect_message(what, parts, [kernel] { run(kernel, 0, global, 32); });
  };
  fails("copy past an allocation", {"cp.async: 16 bytes", "outside every allocation"},
        [](float* out, int) {
          DYNABERT_SHARED_MEMORY(memory);
          copy_async_16(shared_address(memory) + threadIdx.x * 16, out + threadIdx.x * 4);
        });
  fails("misaligned copy", {"cp.async: global address", "no multiple of 16"}, [](float* out, int) {
    DYNABERT_SHARED_MEMORY(memory);
    copy_async_16(shared_address(memory), out + 1);
  });
  fails("__ldg past an allocation", {"__ldg", "outside every allocation"},
        [](float* out, int) { out[0] = __ldg(out + 100); });
  fails("store past shared memory", {"store to shared memory: 16 bytes"}, [](float*, int) {
    DYNABERT_SHARED_MEMORY(memory);
    store_shared(shared_address(memory) + 4096 - threadIdx.x * 16, make_uint4(0, 0, 0, 0));
  });
  fails("misaligned matrix", {"ldmatrix: shared address"}, [](float*, int) {
    DYNABERT_SHARED_MEMORY(memory);
    std::uint32_t r[4];
    load_matrix_x4(r, shared_address(memory) + 8);
  });
  fails("pointer past shared memory", {"not in the block's shared memory"},
        [](float* out, int) { shared_address(out); });
  fails("barrier of nobody", {"was never initialised"}, [](float*, int) {
    DYNABERT_SHARED_MEMORY(memory);
    mbarrier_arrive(shared_address(memory));
  });
  fails("one arrival too many", {"more arrivals than it expects"}, [](float*, int) {
    DYNABERT_SHARED_MEMORY(memory);
    const std::uint32_t barrier = shared_address(memory);
    if (threadIdx.x == 0) mbarrier_init(barrier, 16);
    __syncwarp();
    mbarrier_arrive_expect(barrier, 16);
  });
  fails("shuffle beside a product", {"meets"}, [](float*, int) {
    float d[4] = {};
    if (threadIdx.x < 16) {
      mma_m16n8k16(d, 0, 0, 0, 0, 0, 0);
    } else {
      __shfl_xor_sync(0xffffffffu, 1, 1);
    }
  });
  expect_message("store past an allocation", {"outside an allocation of 400 bytes"}, [] {
    run([](float* out, int) { out[100] = 0.0f; }, 0, global, 1);
    cudaFree(global);
  });
}

void test_deadlocks() {
  static const Array<float> out(128);
  const auto fails = [](const char* what, std::vector<const char*> parts,
                        void (*kernel)(float*, int)) {
    parts.push_back("no thread can go on");
    expect_message(what, parts, [kernel] { run(kernel, 0, out.data, 128); });
  };
  fails("a lane that is not there",
        {"block (0, 0, 0) thread (33, 0, 0) to (63, 0, 0): waits for mma.bf16",
         "block (0, 0, 0) thread (0, 0, 0) to (32, 0, 0): waits for __syncthreads"},
        [](float*, int) {
          float d[4] = {};
          if (threadIdx.x != 32) mma_m16n8k16(d, 0, 0, 0, 0, 0, 0);
          __syncthreads();
        });
  fails("a warp that is not there",
        {"block (0, 0, 0) thread (0, 0, 0) to (95, 0, 0): waits for named barrier 0x3"},
        [](float*, int) {
          if (threadIdx.x < 96) emulation::arrive_at_barrier(3, 128, true);
        });
  fails("bytes that nobody sends", {"thread (7, 0, 0): waits for mbarrier"}, [](float*, int) {
    DYNABERT_SHARED_MEMORY(memory);
    const std::uint32_t barrier = shared_address(memory);
    if (threadIdx.x != 7) return;
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, 16);
    mbarrier_wait(barrier, 0);
  });
}

// A block's memory is NaN, whoever had it before; a launch that no card takes is refused.
void test_launches() {
  const Array<float> out(1024);
  for (int launch = 0; launch < 2; ++launch) {
    run(
        [](float* to, int) {
          DYNABERT_SHARED_MEMORY(memory);
          to[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
          reinterpret_cast<float*>(memory)[threadIdx.x] = 1.0f;
        },
        0, out.data, 1024);
    for (int i = 0; i < 1024; ++i) expect(std::isnan(out.data[i]), "shared memory is not poison");
  }
  const auto error = [&](const LaunchShape& shape) {
    const cudaError_t returned = launch_kernel(reverse_kernel, shape, nullptr, out.data, 0);
    expect(returned == cudaGetLastError(), "cudaGetLastError");
    return returned;
  };
  expect(error({.grid = 1, .block = 1025}) == cudaErrorInvalidConfiguration, "threads of a block");
  expect(error({.grid = dim3(1, 65536), .block = 32}) == cudaErrorInvalidConfiguration, "grid");
  expect(error({.grid = 1, .block = 32, .shared_bytes = 300 << 10}) == cudaErrorInvalidValue,
         "shared memory");
  expect(error({.grid = 9999, .block = 32, .shared_bytes = 4096, .cooperative = true}) ==
             cudaErrorCooperativeLaunchTooLarge,
         "blocks of a cooperative grid");
}

// Every block once, whatever their order; several threads of the program at the same time.
void test_grids() {
  const auto count = [](float* out, int) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * 12 + (threadIdx.z * 2 + threadIdx.y) * 3 + threadIdx.x] += 1.0f;
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&count] {
      const Array<float> out(24 * 12);
      cudaMemset(out.data, 0, out.size * sizeof(float));
      void (*const kernel)(float*, int) = count;
      const LaunchShape shape = {.grid = dim3(4, 3, 2), .block = dim3(3, 2, 2)};
      for (int launch = 1; launch < 4; ++launch) {
        if (launch_kernel(kernel, shape, nullptr, out.data, 0) != cudaSuccess) std::exit(1);
        for (std::size_t j = 0; j < out.size; ++j) {
          if (out.data[j] != static_cast<float>(launch)) std::exit(1);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A recorded launch runs when the graph does, with the memory of that time.
void test_graphs() {
  const Array<float> out(128);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCreate(&stream);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  launch_kernel(reverse_kernel, {.grid = 1, .block = 128, .shared_bytes = 512}, stream, out.data,
                0);
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&executable, graph, 0);
  expect(std::isnan(out.data[5]), "a recorded launch has run");
  for (int launch = 0; launch < 2; ++launch) {
    cudaMemset(out.data, 0xff, 512);
    cudaGraphLaunch(executable, stream);
    expect(out.data[5] == 5.0f, "a graph's launch has not run");
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1;
  // The draws of the emulation, which reads its seed before main() begins.
  if (argc > 2) emulation::random_draw = emulation::Random(std::strtoull(argv[2], nullptr, 10));
  for (int i = 0; i < cases; ++i) {
    test_missing_barriers(40);
    test_missing_product_wait(40);
    test_accesses();
    test_deadlocks();
    test_launches();
    test_grids();
    test_graphs();
  }
  std::printf("%d cases, %d failed\n", cases, failures);
  return failures != 0;
}

#endif
