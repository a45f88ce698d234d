// CUDA's device functions under their own names.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "grid.h"
#include "meet.h"
#include "memory.h"
#include "warp.h"

// A static array in a kernel would be one per thread here: kernels use DYNABERT_SHARED_MEMORY.
#undef __shared__

#define __launch_bounds__(...)

inline void __syncthreads() { dynabert::emulation::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  dynabert::emulation::meet_warp("__syncwarp", mask);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { dynabert::emulation::fail("__trap()"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return dynabert::emulation::shuffle(
      "__shfl_sync", mask, value, [=](int lane) { return lane / width * width + source % width; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return dynabert::emulation::shuffle("__shfl_xor_sync", mask, value, [=](int lane) {
    const int source = lane ^ bits;
    return source / width == lane / width ? source : -1;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return dynabert::emulation::shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    const int source = lane - static_cast<int>(distance);
    return source >= lane / width * width ? source : -1;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return dynabert::emulation::shuffle("__shfl_down_sync", mask, value, [=](int lane) {
    const int source = lane + static_cast<int>(distance);
    return source < (lane / width + 1) * width ? source : -1;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Operands {
    bool in;
    unsigned out;
  } own = {predicate != 0, 0};
  dynabert::emulation::collective("__ballot_sync", mask, own, [](Operands* const(&lanes)[32]) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] != nullptr && lanes[lane]->in) bits |= 1u << lane;
    }
    for (Operands* each : lanes) {
      if (each != nullptr) each->out = bits;
    }
  });
  return own.out;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

// Loads, checked against the allocations.
template <typename T>
T __ldg(const T* pointer) {
  dynabert::emulation::check_global(pointer, sizeof(T), alignof(T), "__ldg");
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  dynabert::emulation::check_global(pointer, sizeof(T), alignof(T), "__ldcg");
  return *pointer;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace dynabert::emulation {

inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}

}  // namespace dynabert::emulation
