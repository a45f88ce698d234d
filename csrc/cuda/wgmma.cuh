// Matrix products of a warpgroup (sm_90a): D[64, N] += A[64, 16] @ B[16, N], bf16 in, float out.
//
// A and B are read from shared memory through descriptors; all tiles here use the 128-byte swizzle
// and start at a multiple of 1024 bytes. D lies in registers: thread t of warp w holds, in
// d[4 * j + {0, 1, 2, 3}], columns 8 * j + 2 * (t % 4) + {0, 1, 0, 1} of rows
// 16 * w + t / 4 + {0, 0, 8, 8}.

#pragma once

#include <cstdint>

#include "device.cuh"
#ifndef __CUDACC__
#include "emulation/wgmma.h"
#endif

namespace dynabert {

// Bytes, not elements; `leading` matters only to a transposed B of more than 64 columns.
//
// K innermost:  rows of 128 bytes (64 K values); `stride` = 1024 steps 8 rows; the next 16 K values
//               are 32 bytes further.
// N innermost:  rows of 128 bytes (64 N values), one per K value; `stride` = 1024 steps 8 K values;
//               `leading` steps 64 N values; the next 16 K values are 2048 bytes further.
__device__ __forceinline__ std::uint64_t wgmma_descriptor(std::uint32_t address,
                                                          std::uint32_t leading,
                                                          std::uint32_t stride) {
  constexpr std::uint64_t kSwizzle128 = 1;
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(stride >> 4) << 32 | kSwizzle128 << 62;
}

// A descriptor moved by a multiple of 16 bytes.
__device__ __forceinline__ std::uint64_t wgmma_advance(std::uint64_t descriptor,
                                                       std::uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Before the first product that reads registers written by ordinary instructions.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulation::meet_warp("wgmma.fence");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulation::wgmma_commit();
#endif
}

// Until at most `kPending` of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  emulation::wgmma_wait(kPending);
#endif
}

// Keeps the compiler from moving accesses to an accumulator across this point.
template <int kSize>
__device__ __forceinline__ void pin_registers([[maybe_unused]] float (&d)[kSize]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

template <bool kTransposeB>
__device__ __forceinline__ void wgmma_m64n192k16(float (&d)[96], std::uint64_t a, std::uint64_t b,
                                                 int accumulate) {
#ifdef __CUDACC__
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %98, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
      "}, %96, %97, p, 1, 1, 0, %99;\n\t}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB ? 1 : 0));
#else
  emulation::wgmma<192>(d, a, b, accumulate != 0, kTransposeB);
#endif
}

}  // namespace dynabert
