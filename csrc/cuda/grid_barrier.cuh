// A barrier of all thread blocks of a grid, and the barriers below it: cluster, part of a block.

#pragma once

#include <cstdint>

#include "device.cuh"
#ifndef __CUDACC__
#include "emulation/mbarrier.h"
#endif

namespace dynabert {

// Words in device memory by which blocks meet.
__device__ __forceinline__ unsigned long long add_release(unsigned long long* word,
                                                          unsigned long long value) {
#ifdef __CUDACC__
  unsigned long long before;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(word), "l"(value)
               : "memory");
  return before;
#else
  emulation::check_global(word, 8, 8, "atom.add");
  const unsigned long long before = *word;
  *word += value;
  return before;
#endif
}
__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* word) {
#ifdef __CUDACC__
  unsigned long long value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  emulation::check_global(word, 8, 8, "ld.acquire");
  return *word;
#endif
}
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* word) {
#ifdef __CUDACC__
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
#else
  emulation::check_global(word, 8, 8, "ld.relaxed");
  return *word;
#endif
}
__device__ __forceinline__ void store_relaxed(unsigned long long* word, unsigned long long value) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
#else
  emulation::check_global(word, 8, 8, "st.relaxed");
  *word = value;
#endif
}

// Polls a word that another block writes; DYNABERT_SPIN_LIMIT_NS as in mbarrier_wait.
__device__ __forceinline__ unsigned long long wait_for_nonzero(const unsigned long long* word) {
#ifdef __CUDACC__
#ifdef DYNABERT_SPIN_LIMIT_NS
  std::uint64_t start = 0;
#endif
  while (true) {
    const unsigned long long value = load_relaxed(word);
    if (value != 0) return value;
#ifdef DYNABERT_SPIN_LIMIT_NS
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start == 0) start = now;
    if (now - start > DYNABERT_SPIN_LIMIT_NS) __trap();
#endif
  }
#else
  emulation::wait_until("a word of another block", [word] { return load_relaxed(word) != 0; });
  return load_relaxed(word);
#endif
}

// One counter in device memory, zeroed once in its life. Blocks only ever add to it, and every
// launch adds a multiple of its grid, so tickets [n * grid, (n + 1) * grid) belong to the n-th
// meeting: nothing is reset between launches and a captured graph can be replayed. The grid size
// may not change while a counter is in use.
//
// One thread per block holds this object. The threads of the block whose writes others are to see
// meet that thread in a block barrier before arrive(), those that want to see others' writes after
// wait(). Every block of the grid must be resident.
struct GridBarrier {
  unsigned long long target = 0;  // the counter's value once all have arrived

  __device__ void arrive(unsigned long long* counter, unsigned blocks) {
    if (target == 0) {
      target = (add_release(counter, 1) / blocks + 1) * blocks;
    } else {
      add_release(counter, 1);
      target += blocks;
    }
  }

  __device__ void wait(const unsigned long long* counter) const {
#ifdef __CUDACC__
    // A round trip is several hundred cycles: this many take about two seconds. A block that never
    // comes must end the kernel, not hang the device.
    constexpr int kMaxPolls = 1 << 22;
    for (int poll = 0; load_acquire(counter) < target; ++poll) {
      if (poll == kMaxPolls) __trap();
    }
#else
    emulation::wait_until("the grid", [&] { return load_acquire(counter) >= target; });
#endif
  }
};

// Every thread of every block of the cluster; orders shared memory of the whole cluster.
__device__ __forceinline__ void cluster_arrive() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emulation::meet_warp("barrier.cluster.arrive.aligned");
  emulation::cluster_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulation::meet_warp("barrier.cluster.wait.aligned");
  emulation::cluster_wait();
#endif
}

__device__ __forceinline__ std::uint32_t cluster_rank() {
#ifdef __CUDACC__
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return emulation::cluster_rank();
#endif
}

// The address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ std::uint32_t cluster_address(std::uint32_t address, int rank) {
#ifdef __CUDACC__
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
#else
  return emulation::cluster_address(address, static_cast<std::uint32_t>(rank));
#endif
}

__device__ __forceinline__ uint2 cluster_load(std::uint32_t address) {
#ifdef __CUDACC__
  uint2 v;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address)
               : "memory");
  return v;
#else
  return emulation::load_shared<uint2>(address);
#endif
}

// Named barriers: `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::arrive_at_barrier(id, threads, true);
#endif
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::arrive_at_barrier(id, threads, false);
#endif
}

}  // namespace dynabert
