// Shared-memory barriers that count arrivals and bytes (sm_90), and the cluster's own barrier.
//
// A barrier completes phase after phase; waiting names the parity (0, 1, 0, ...) of the phase
// awaited. A fresh barrier counts as having completed a phase of parity 1, so that a producer that
// waits for "empty" with the opposite parity of its round passes through the first round.

#pragma once

#include <cstdint>

#include "device.cuh"
#ifndef __CUDACC__
#include "emulation/mbarrier.h"
#endif

namespace dynabert {

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
#else
  emulation::mbarrier_init(barrier, arrivals);
#endif
}

// Makes initialised barriers visible to the other blocks of the cluster and to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  emulation::mbarrier_arrive(barrier, 0);
#endif
}

// One arrival, and `bytes` more for the copy engine to deliver before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t barrier, std::uint32_t bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#else
  emulation::mbarrier_arrive(barrier, bytes);
#endif
}

// Arrives at the same barrier of block `rank` of the cluster. It says "I have read my memory" to a
// copy engine, so it needs no order among ordinary accesses of two blocks; `.release.cluster` would
// add a fence of the whole device to every K block.
__device__ __forceinline__ void mbarrier_arrive_cluster(std::uint32_t barrier, std::uint32_t rank) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#else
  emulation::mbarrier_arrive(emulation::cluster_address(barrier, rank), 0);
#endif
}

// Waits for the phase of `parity`. DYNABERT_SPIN_LIMIT_NS, set by test builds, turns a wait that
// never ends into a launch failure.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
#ifdef __CUDACC__
#ifdef DYNABERT_SPIN_LIMIT_NS
  std::uint64_t start = 0;
#endif
  while (true) {
    std::uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
#ifdef DYNABERT_SPIN_LIMIT_NS
    std::uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start == 0) start = now;
    if (now - start > DYNABERT_SPIN_LIMIT_NS) __trap();
#endif
  }
#else
  emulation::mbarrier_wait(barrier, parity);
#endif
}

// Every thread of every block of the cluster. Not `.aligned`: roles arrive on their own.
__device__ __forceinline__ void cluster_sync() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  emulation::cluster_arrive();
  emulation::cluster_wait();
#endif
}

// The same after mbarrier_init_fence, which already orders all that the others need to see.
__device__ __forceinline__ void cluster_sync_initialised() {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  emulation::cluster_arrive();
  emulation::cluster_wait();
#endif
}

// A barrier of the 128 threads of one warpgroup; id 0 is __syncthreads.
__device__ __forceinline__ void warpgroup_sync(std::uint32_t id) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
#else
  emulation::arrive_at_barrier(static_cast<int>(id), 128, true);
#endif
}

}  // namespace dynabert
