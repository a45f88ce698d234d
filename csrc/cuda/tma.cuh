// The bulk tensor copy engine (sm_90): boxes of a tensor described by a CUtensorMap to and from
// shared memory. Every call is made by one thread. Coordinates are in elements, innermost first;
// what a box covers outside the tensor is read as zero and not written.

#pragma once

#include <cuda.h>

#include <cstdint>

#include "device.cuh"
#ifndef __CUDACC__
#include "emulation/tensor_map.h"
#endif

namespace dynabert {

__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  emulation::check_tensor_map(map);
#endif
}

__device__ __forceinline__ void tma_load(std::uint32_t destination, const CUtensorMap* map,
                                         std::uint32_t barrier, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
#else
  emulation::tma_load(destination, map, barrier, 0, {x, y, 0}, 2);
#endif
}

__device__ __forceinline__ void tma_load(std::uint32_t destination, const CUtensorMap* map,
                                         std::uint32_t barrier, int x, int y, int z) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  emulation::tma_load(destination, map, barrier, 0, {x, y, z}, 3);
#endif
}

// The multicast forms write to the same offset of every block in `mask` and count the bytes on
// the same barrier of each: one read of L2 serves the cluster.
__device__ __forceinline__ void tma_load_multicast(std::uint32_t destination,
                                                   const CUtensorMap* map, std::uint32_t barrier,
                                                   std::uint16_t mask, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(destination),
      "l"(map), "r"(barrier), "h"(mask), "r"(x), "r"(y)
      : "memory");
#else
  emulation::tma_load(destination, map, barrier, mask, {x, y, 0}, 2);
#endif
}

__device__ __forceinline__ void tma_load_multicast(std::uint32_t destination,
                                                   const CUtensorMap* map, std::uint32_t barrier,
                                                   std::uint16_t mask, int x, int y, int z) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(destination),
      "l"(map), "r"(barrier), "h"(mask), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  emulation::tma_load(destination, map, barrier, mask, {x, y, z}, 3);
#endif
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, std::uint32_t source, int x,
                                          int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(source), "r"(x), "r"(y)
      : "memory");
#else
  emulation::tma_store(map, source, {x, y, 0});
#endif
}

__device__ __forceinline__ void tma_store_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulation::tma_store_commit();
#endif
}

// Until every committed store of this thread has read its shared memory.
__device__ __forceinline__ void tma_store_wait_read() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#else
  emulation::tma_store_wait_read();
#endif
}

}  // namespace dynabert
