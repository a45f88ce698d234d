// Products of a warp (sm_80+), the copies around them, and pairs of 16-bit numbers.

#pragma once

#include <cstdint>
#include <type_traits>

#include "device.cuh"

namespace dynabert {

// 16 bytes from global to shared memory past the registers and past L1, which is not coherent.
__device__ __forceinline__ void copy_async_16(std::uint32_t shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
  emulation::copy_async(shared, global, 16);
#endif
}

// Reads the first `valid_bytes` (0 to 16) alone; the others become zero.
__device__ __forceinline__ void copy_async_zfill_16(std::uint32_t shared, const void* global,
                                                    std::uint32_t valid_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid_bytes)
               : "memory");
#else
  emulation::copy_async(shared, global, valid_bytes);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_async_commit();
#endif
}

// Until at most `kPending` of this thread's committed groups are unfinished. Others see the bytes
// after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::copy_async_wait(kPending);
#endif
}

// Makes shared memory that this thread wrote, by stores or finished copies, visible to warpgroup
// products and to the tensor copy engine.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Four 8 x 8 tiles of 16-bit numbers: lane l names row l % 8 of tile l / 8, and receives elements
// 2 * (l % 4) + {0, 1} of row l / 4 of tile i in r[i].
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  emulation::load_matrix(r, address, false);
#endif
}

// The same with each tile transposed: elements 2 * (l % 4) + {0, 1} of column l / 4.
__device__ __forceinline__ void load_matrix_transposed_x4(std::uint32_t (&r)[4],
                                                          std::uint32_t address) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#else
  emulation::load_matrix(r, address, true);
#endif
}

// The way back of load_matrix_x4 (sm_90).
__device__ __forceinline__ void store_matrix_x4(std::uint32_t address,
                                                const std::uint32_t (&r)[4]) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  emulation::store_matrix(address, r);
#endif
}

// D[16, 8] += A[16, 16] @ B[16, 8], T is __nv_bfloat16 or __half. With g = lane / 4, t = lane % 4:
//   a0 (g, 2t..), a1 (g + 8, 2t..), a2 (g, 2t + 8..), a3 (g + 8, 2t + 8..)   (row, k)
//   b0 (2t.., g), b1 (2t + 8.., g)                                           (k, column)
//   d0 d1 (g, 2t..), d2 d3 (g + 8, 2t..)                                     (row, column)
template <typename T = __nv_bfloat16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], std::uint32_t a0, std::uint32_t a1,
                                             std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                             std::uint32_t b1) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
#ifdef __CUDACC__
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#else
  emulation::mma_m16n8k16(d, {a0, a1, a2, a3}, {b0, b1}, kHalf);
#endif
}

__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack_bf16(std::uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ std::uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ float2 unpack_half(std::uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The same by element type.
template <typename T>
__device__ __forceinline__ std::uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    return pack_half(low, high);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return pack_bf16(low, high);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack2(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return unpack_half(pair);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    return unpack_bf16(pair);
  }
}

}  // namespace dynabert
