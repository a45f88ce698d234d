// A barrier of all thread blocks of a grid, and the barriers below it: cluster, part of a block.

#pragma once

#include <cstdint>

namespace dynabert {

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
      unsigned long long ticket;
      asm volatile("atom.release.gpu.global.add.u64 %0, [%1], 1;"
                   : "=l"(ticket)
                   : "l"(counter)
                   : "memory");
      target = (ticket / blocks + 1) * blocks;
    } else {
      asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
      target += blocks;
    }
  }

  __device__ void wait(const unsigned long long* counter) const {
    // A round trip is several hundred cycles: this many take about two seconds. A block that never
    // comes must end the kernel, not hang the device.
    constexpr int kMaxPolls = 1 << 22;
    for (int poll = 0;; ++poll) {
      unsigned long long value;
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
      if (value >= target) return;
      if (poll == kMaxPolls) __trap();
    }
  }
};

// Every thread of every block of the cluster; orders shared memory of the whole cluster.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ std::uint32_t cluster_address(std::uint32_t address, int rank) {
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ uint2 cluster_load(std::uint32_t address) {
  uint2 v;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(address)
               : "memory");
  return v;
}

// Named barriers: `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace dynabert
