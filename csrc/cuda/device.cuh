// What every kernel source includes: CUDA's names, and the small functions that stand for single
// instructions. nvcc compiles them to PTX; in plain C++ (no __CUDACC__) they run on the CPU, where
// each thread of a block is a fiber (emulation/).

#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulation/device.h"
#endif

#include <cstdint>

// `unsigned char* name`: the block's dynamic shared memory. First statement of a kernel.
#ifdef __CUDACC__
#define DYNABERT_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#define DYNABERT_SHARED_MEMORY(name) \
  unsigned char* const name = ::dynabert::emulation::shared_memory()
#endif

namespace dynabert {

// The address of shared memory that copies and matrix instructions take.
__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
#ifdef __CUDACC__
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return emulation::shared_address(pointer);
#endif
}

// Not ordered with the compiler's own accesses: a barrier comes before anyone reads.
__device__ __forceinline__ void store_shared(std::uint32_t address, uint4 v) {
#ifdef __CUDACC__
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
#else
  emulation::store_shared(address, v);
#endif
}
__device__ __forceinline__ void store_shared(std::uint32_t address, std::uint32_t value) {
#ifdef __CUDACC__
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#else
  emulation::store_shared(address, value);
#endif
}
__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
#ifdef __CUDACC__
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  emulation::store_shared(address, value);
#endif
}

// Ordered with the other volatile statements alone, so that the compiler may batch them.
__device__ __forceinline__ float2 load_shared_pair(std::uint32_t address) {
#ifdef __CUDACC__
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
#else
  return emulation::load_shared<float2>(address);
#endif
}
__device__ __forceinline__ uint4 load_shared_uint4(std::uint32_t address) {
#ifdef __CUDACC__
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
#else
  return emulation::load_shared<uint4>(address);
#endif
}

// Reads through L2: what other blocks wrote during this kernel may be stale in L1.
__device__ __forceinline__ uint4 load_coherent(const uint4* pointer) { return __ldcg(pointer); }

// 2^x, 0 where that is subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulation::exp2_flushed(x);
#endif
}

// Moves registers of the multiprocessor to or from this warpgroup (sm_90a): as many per thread.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulation::meet_warp("setmaxnreg");
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulation::meet_warp("setmaxnreg");
#endif
}

// A kernel that was launched as `programmatic` may have begun while the one before it still runs:
// until that has ended and its results are there.
__device__ __forceinline__ void wait_for_previous_kernel() {
#ifdef __CUDACC__
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel of the stream, if `programmatic`, may begin.
__device__ __forceinline__ void allow_next_kernel() {
#ifdef __CUDACC__
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The value, made anew at this point: the compiler may not compute from it ahead of time.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

}  // namespace dynabert
