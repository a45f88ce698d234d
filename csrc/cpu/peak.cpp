#include "cpu/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "checks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynabert {
namespace {

using Clock = std::chrono::steady_clock;

// One slice is long against a thread's start and short against the time a neighbour is quiet.
constexpr double kSliceSeconds = 0.05;
// Four times the largest last-level cache in use (64 MiB seen by one process).
constexpr std::size_t kMemoryBytes = std::size_t{256} << 20;
// Operations are counted per call of a loop; each call runs for a few microseconds, so that asking
// the clock costs nothing.
constexpr int kRepeats = 2048;

#if defined(__x86_64__)

// Independent sums: two pipes, each with a latency of 4 to 8 cycles, want 8 to 16 in flight. Twenty
// leave registers for the operands.
constexpr int kSums = 20;

// Stands for a use of the value, so that the compiler neither drops nor moves what made it. Of each
// sum by itself: an array that is looped over would live in memory.
#define DYNABERT_KEEP(value) asm volatile("" : "+v"(value))

__attribute__((target("avx512f"))) double fp32_avx512() {
  __m512 sums[kSums];
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int i = 0; i < kRepeats; ++i) {
    DYNABERT_KEEP(a);  // not a constant, so that nothing is computed ahead
#pragma GCC unroll 20
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_fmadd_ps(a, b, sums[j]);
  }
#pragma GCC unroll 20
  for (int j = 0; j < kSums; ++j) DYNABERT_KEEP(sums[j]);
  return 2.0 * 16 * kSums * kRepeats;
}

__attribute__((target("avx2,fma"))) double fp32_avx2() {
  constexpr int kFew = 12;  // of the 16 registers
  __m256 sums[kFew];
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (int i = 0; i < kRepeats; ++i) {
    DYNABERT_KEEP(a);
#pragma GCC unroll 12
    for (int j = 0; j < kFew; ++j) sums[j] = _mm256_fmadd_ps(a, b, sums[j]);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kFew; ++j) DYNABERT_KEEP(sums[j]);
  return 2.0 * 8 * kFew * kRepeats;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) double bf16_avx512() {
  __m512 sums[kSums];
  __m512i bits = _mm512_set1_epi16(0x3f00);  // 0.5
  const __m512bh b = (__m512bh)bits;
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int i = 0; i < kRepeats; ++i) {
    DYNABERT_KEEP(bits);
    const __m512bh a = (__m512bh)bits;
#pragma GCC unroll 20
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
  }
#pragma GCC unroll 20
  for (int j = 0; j < kSums; ++j) DYNABERT_KEEP(sums[j]);
  return 2.0 * 32 * kSums * kRepeats;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) double int8_avx512() {
  // Not __m512i, which may alias anything: an array of those stays in memory. The intrinsic brings
  // a copy of each sum besides (g++ 12), hence the instruction itself.
  typedef int Int32x16 __attribute__((vector_size(64)));
  Int32x16 sums[kSums] = {};
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  for (int i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 20
    for (int j = 0; j < kSums; ++j)
      asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[j]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 20
  for (int j = 0; j < kSums; ++j) DYNABERT_KEEP(sums[j]);
  return 2.0 * 64 * kSums * kRepeats;
}

__attribute__((target("avx2"))) void read_avx2(const char* begin, const char* end) {
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (const char* at = begin; at + 256 <= end; at += 256) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i* const from = reinterpret_cast<const __m256i*>(at + 32 * j);
      sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(from));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) DYNABERT_KEEP(sums[j]);
}

#undef DYNABERT_KEEP
#endif

void read_portable(const char* begin, const char* end) {
  std::uint64_t sums[8] = {};
  for (const char* at = begin; at + 64 <= end; at += 64) {
    for (int j = 0; j < 8; ++j) {
      std::uint64_t word;
      std::memcpy(&word, at + 8 * j, 8);
      sums[j] ^= word;
    }
  }
  for (std::uint64_t& sum : sums) asm volatile("" : "+r"(sum));
}

// A loop that returns what it did, in operations or bytes, for one thread.
using Loop = double (*)();

// The loop for an arithmetic kind on this CPU; null if it lacks the instructions.
Loop arithmetic_loop(const std::string& kind) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (kind == "fp32") {
    if (avx512) return fp32_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fp32_avx2;
  }
  if (kind == "bf16" && avx512 && __builtin_cpu_supports("avx512bf16")) return bf16_avx512;
  if (kind == "int8" && avx512 && __builtin_cpu_supports("avx512vnni")) return int8_avx512;
#else
  (void)kind;
#endif
  return nullptr;
}

void read_memory(const char* begin, const char* end) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) {
    read_avx2(begin, end);
    return;
  }
#endif
  read_portable(begin, end);
}

// Runs `work(thread)` over and over on each thread, all at once, and returns the best rate of a
// slice in units per second, the sum over the threads. `work` returns the units it did.
template <typename Work>
double best_rate(int threads, double seconds, const Work& work) {
  const int slices = std::max(3, static_cast<int>(seconds / kSliceSeconds));
  double best = 0;
  for (int slice = 0; slice < slices; ++slice) {
    std::vector<double> rates(threads, 0.0);
    std::atomic<int> waiting{threads};
    const auto run = [&](int thread) {
      work(thread);  // pages, caches and clock
      --waiting;
      while (waiting.load() > 0) std::this_thread::yield();
      const auto start = Clock::now();
      double units = 0, elapsed = 0;
      while (elapsed < kSliceSeconds) {
        units += work(thread);
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[thread] = units / elapsed;
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

double memory_rate(int threads, double seconds) {
  // Aligned to a cache line, each thread's part too.
  const std::size_t part = (kMemoryBytes / threads) & ~std::size_t{255};
  const std::unique_ptr<char[]> buffer(new char[part * threads + 64]);
  char* base = buffer.get();
  base += (64 - reinterpret_cast<std::uintptr_t>(base) % 64) % 64;
  std::memset(base, 1, part * threads);  // or every page would be the same page of zeros
  return best_rate(threads, seconds, [&](int thread) {
    // A piece at a time, so that a slow machine asks the clock as well.
    thread_local std::size_t at = 0;
    constexpr std::size_t kPiece = std::size_t{1} << 20;
    const char* const mine = base + part * thread;
    const std::size_t size = std::min(kPiece, part);
    if (at + size > part) at = 0;
    read_memory(mine + at, mine + at + size);
    at += size;
    return static_cast<double>(size);
  });
}

}  // namespace

double measure_peak(const std::string& kind, int threads, double seconds) {
  DYNABERT_CHECK_VALUE(threads >= 1, "measure_peak", "threads", threads, "1 or more",
                       "Each thread keeps one core busy.");
  DYNABERT_CHECK_VALUE(seconds > 0, "measure_peak", "seconds", seconds, "more than 0",
                       "A second is plenty.");
  if (kind == "memory") return memory_rate(threads, seconds);
  DYNABERT_CHECK_VALUE(kind == "fp32" || kind == "bf16" || kind == "int8", "measure_peak", "kind",
                       "'" + kind + "'", "fp32, bf16, int8 or memory", "Ask for one of these.");
  const Loop loop = arithmetic_loop(kind);
  DYNABERT_CHECK_VALUE(loop != nullptr, "measure_peak", "kind", "'" + kind + "'",
                       "a kind this CPU has instructions for",
                       "fp32 needs AVX2, bf16 AVX512-BF16, int8 AVX512-VNNI.");
  return best_rate(threads, seconds, [loop](int) { return loop(); });
}

}  // namespace dynabert
