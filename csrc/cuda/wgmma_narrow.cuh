// Warpgroup products of narrow tiles (sm_90a): D[64, N] += A[64, 16] @ B[16, N], N = 8 .. 128.
//
// Few tokens leave each SM a slice of the weights whose width follows the subnet's, so every
// multiple of 8 is here. Registers of D as in wgmma.cuh.

#pragma once

#include <cstdint>

#include "wgmma.cuh"

namespace dynabert {

// A B operand with N innermost in rows of 32 bytes (16 N values), one per K value, 32-byte swizzle:
// 256 bytes step 8 K values, `leading` bytes step 16 N values; the next 16 K values are 512 bytes
// further. Tiles start at a multiple of 256 bytes. Of all layouts with N innermost this one serves
// every N that is a multiple of 16.
__device__ __forceinline__ std::uint64_t wgmma_descriptor_32(std::uint32_t address,
                                                             std::uint32_t leading) {
  constexpr std::uint64_t kSwizzle32 = 3;
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<std::uint64_t>(leading >> 4) << 16 |
         static_cast<std::uint64_t>(256 >> 4) << 32 | kSwizzle32 << 62;
}

#ifndef __CUDACC__
template <int kColumns>
struct NarrowWgmma {
  template <bool kTransposeB>
  static void run(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, int accumulate) {
    emulation::wgmma<kColumns>(d, a, b, accumulate != 0, kTransposeB);
  }
};
#else
template <int kColumns>
struct NarrowWgmma;

// One specialisation: the columns, the accumulators' names and operands, and the numbers of the
// operands that follow them.
#define DYNABERT_NARROW_WGMMA(N, NAMES, OPERANDS, A, B, ACCUMULATE, TRANSPOSE)                \
  template <>                                                                                 \
  struct NarrowWgmma<N> {                                                                     \
    template <bool kTransposeB>                                                               \
    __device__ static __forceinline__ void run(float (&d)[N / 2], std::uint64_t a,            \
                                               std::uint64_t b, int accumulate) {             \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ACCUMULATE                       \
                   ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES \
                   "}, %" #A ", %" #B ", p, 1, 1, 0, %" #TRANSPOSE ";\n\t}"                   \
                   : OPERANDS                                                                 \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeB ? 1 : 0));              \
    }                                                                                         \
  };

#define DYNABERT_NAMES_8 "%0, %1, %2, %3"
#define DYNABERT_NAMES_16 DYNABERT_NAMES_8 ", %4, %5, %6, %7"
#define DYNABERT_NAMES_24 DYNABERT_NAMES_16 ", %8, %9, %10, %11"
#define DYNABERT_NAMES_32 DYNABERT_NAMES_24 ", %12, %13, %14, %15"
#define DYNABERT_NAMES_40 DYNABERT_NAMES_32 ", %16, %17, %18, %19"
#define DYNABERT_NAMES_48 DYNABERT_NAMES_40 ", %20, %21, %22, %23"
#define DYNABERT_NAMES_56 DYNABERT_NAMES_48 ", %24, %25, %26, %27"
#define DYNABERT_NAMES_64 DYNABERT_NAMES_56 ", %28, %29, %30, %31"
#define DYNABERT_NAMES_72 DYNABERT_NAMES_64 ", %32, %33, %34, %35"
#define DYNABERT_NAMES_80 DYNABERT_NAMES_72 ", %36, %37, %38, %39"
#define DYNABERT_NAMES_88 DYNABERT_NAMES_80 ", %40, %41, %42, %43"
#define DYNABERT_NAMES_96 DYNABERT_NAMES_88 ", %44, %45, %46, %47"
#define DYNABERT_NAMES_104 DYNABERT_NAMES_96 ", %48, %49, %50, %51"
#define DYNABERT_NAMES_112 DYNABERT_NAMES_104 ", %52, %53, %54, %55"
#define DYNABERT_NAMES_120 DYNABERT_NAMES_112 ", %56, %57, %58, %59"
#define DYNABERT_NAMES_128 DYNABERT_NAMES_120 ", %60, %61, %62, %63"
#define DYNABERT_OPERANDS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define DYNABERT_OPERANDS_16 DYNABERT_OPERANDS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define DYNABERT_OPERANDS_24 DYNABERT_OPERANDS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define DYNABERT_OPERANDS_32 \
  DYNABERT_OPERANDS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define DYNABERT_OPERANDS_40 \
  DYNABERT_OPERANDS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define DYNABERT_OPERANDS_48 \
  DYNABERT_OPERANDS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define DYNABERT_OPERANDS_56 \
  DYNABERT_OPERANDS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define DYNABERT_OPERANDS_64 \
  DYNABERT_OPERANDS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define DYNABERT_OPERANDS_72 \
  DYNABERT_OPERANDS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define DYNABERT_OPERANDS_80 \
  DYNABERT_OPERANDS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define DYNABERT_OPERANDS_88 \
  DYNABERT_OPERANDS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define DYNABERT_OPERANDS_96 \
  DYNABERT_OPERANDS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define DYNABERT_OPERANDS_104 \
  DYNABERT_OPERANDS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define DYNABERT_OPERANDS_112 \
  DYNABERT_OPERANDS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define DYNABERT_OPERANDS_120 \
  DYNABERT_OPERANDS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define DYNABERT_OPERANDS_128 \
  DYNABERT_OPERANDS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

DYNABERT_NARROW_WGMMA(8, DYNABERT_NAMES_8, DYNABERT_OPERANDS_8, 4, 5, 6, 7)
DYNABERT_NARROW_WGMMA(16, DYNABERT_NAMES_16, DYNABERT_OPERANDS_16, 8, 9, 10, 11)
DYNABERT_NARROW_WGMMA(24, DYNABERT_NAMES_24, DYNABERT_OPERANDS_24, 12, 13, 14, 15)
DYNABERT_NARROW_WGMMA(32, DYNABERT_NAMES_32, DYNABERT_OPERANDS_32, 16, 17, 18, 19)
DYNABERT_NARROW_WGMMA(40, DYNABERT_NAMES_40, DYNABERT_OPERANDS_40, 20, 21, 22, 23)
DYNABERT_NARROW_WGMMA(48, DYNABERT_NAMES_48, DYNABERT_OPERANDS_48, 24, 25, 26, 27)
DYNABERT_NARROW_WGMMA(56, DYNABERT_NAMES_56, DYNABERT_OPERANDS_56, 28, 29, 30, 31)
DYNABERT_NARROW_WGMMA(64, DYNABERT_NAMES_64, DYNABERT_OPERANDS_64, 32, 33, 34, 35)
DYNABERT_NARROW_WGMMA(72, DYNABERT_NAMES_72, DYNABERT_OPERANDS_72, 36, 37, 38, 39)
DYNABERT_NARROW_WGMMA(80, DYNABERT_NAMES_80, DYNABERT_OPERANDS_80, 40, 41, 42, 43)
DYNABERT_NARROW_WGMMA(88, DYNABERT_NAMES_88, DYNABERT_OPERANDS_88, 44, 45, 46, 47)
DYNABERT_NARROW_WGMMA(96, DYNABERT_NAMES_96, DYNABERT_OPERANDS_96, 48, 49, 50, 51)
DYNABERT_NARROW_WGMMA(104, DYNABERT_NAMES_104, DYNABERT_OPERANDS_104, 52, 53, 54, 55)
DYNABERT_NARROW_WGMMA(112, DYNABERT_NAMES_112, DYNABERT_OPERANDS_112, 56, 57, 58, 59)
DYNABERT_NARROW_WGMMA(120, DYNABERT_NAMES_120, DYNABERT_OPERANDS_120, 60, 61, 62, 63)
DYNABERT_NARROW_WGMMA(128, DYNABERT_NAMES_128, DYNABERT_OPERANDS_128, 64, 65, 66, 67)

#undef DYNABERT_NAMES_8
#undef DYNABERT_OPERANDS_8
#undef DYNABERT_NAMES_16
#undef DYNABERT_OPERANDS_16
#undef DYNABERT_NAMES_24
#undef DYNABERT_OPERANDS_24
#undef DYNABERT_NAMES_32
#undef DYNABERT_OPERANDS_32
#undef DYNABERT_NAMES_40
#undef DYNABERT_OPERANDS_40
#undef DYNABERT_NAMES_48
#undef DYNABERT_OPERANDS_48
#undef DYNABERT_NAMES_56
#undef DYNABERT_OPERANDS_56
#undef DYNABERT_NAMES_64
#undef DYNABERT_OPERANDS_64
#undef DYNABERT_NAMES_72
#undef DYNABERT_OPERANDS_72
#undef DYNABERT_NAMES_80
#undef DYNABERT_OPERANDS_80
#undef DYNABERT_NAMES_88
#undef DYNABERT_OPERANDS_88
#undef DYNABERT_NAMES_96
#undef DYNABERT_OPERANDS_96
#undef DYNABERT_NAMES_104
#undef DYNABERT_OPERANDS_104
#undef DYNABERT_NAMES_112
#undef DYNABERT_OPERANDS_112
#undef DYNABERT_NAMES_120
#undef DYNABERT_OPERANDS_120
#undef DYNABERT_NAMES_128
#undef DYNABERT_OPERANDS_128
#undef DYNABERT_NARROW_WGMMA
#endif

}  // namespace dynabert
