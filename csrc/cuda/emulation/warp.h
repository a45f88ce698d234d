// Instructions that the lanes of a warp carry out together.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "grid.h"
#include "meet.h"
#include "shared.h"

namespace dynabert::emulation {

// Value of lane `source(lane)`, or the own one where that is negative.
template <typename T, typename Source>
T shuffle(const char* what, std::uint32_t mask, T value, const Source& source) {
  static_assert(sizeof(T) <= 8);
  struct Operands {
    T in, out;
    int from;
  };
  const int lane = this_thread().lane;
  const int from = source(lane);
  Operands own = {value, value, from < 0 ? lane : from};
  collective(what, mask, own, [what](Operands* const(&lanes)[kWarpSize]) {
    for (Operands* each : lanes) {
      if (each == nullptr) continue;
      if (lanes[each->from] == nullptr) fail("%s: lane %d takes no part", what, each->from);
      each->out = lanes[each->from]->in;
    }
  });
  return own.out;
}

struct MatrixOperands {
  unsigned char* row;  // this lane's row of a tile
  std::uint32_t* registers;
  bool transposed;
};

inline void load_matrix(std::uint32_t (&r)[4], std::uint32_t address, bool transposed) {
  MatrixOperands own = {shared_bytes(address, 16, 16, "ldmatrix"), r, transposed};
  const char* const what = transposed ? "ldmatrix.trans" : "ldmatrix";
  collective(what, 0xffffffffu, own, [](MatrixOperands* const(&lanes)[kWarpSize]) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int tile = 0; tile < 4; ++tile) {
        std::uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row = lanes[0]->transposed ? lane % 4 * 2 + i : lane / 4;
          const int column = lanes[0]->transposed ? lane / 4 : lane % 4 * 2 + i;
          std::memcpy(&pair[i], lanes[tile * 8 + row]->row + column * 2, 2);
        }
        std::memcpy(&lanes[lane]->registers[tile], pair, 4);
      }
    }
  });
}

inline void store_matrix(std::uint32_t address, const std::uint32_t (&r)[4]) {
  std::uint32_t registers[4] = {r[0], r[1], r[2], r[3]};
  MatrixOperands own = {shared_bytes(address, 16, 16, "stmatrix"), registers, false};
  collective("stmatrix", 0xffffffffu, own, [](MatrixOperands* const(&lanes)[kWarpSize]) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int tile = 0; tile < 4; ++tile) {
        std::memcpy(lanes[tile * 8 + lane / 4]->row + lane % 4 * 4, &lanes[lane]->registers[tile],
                    4);
      }
    }
  });
}

inline float half_to_float(std::uint16_t bits, bool half) {
  if (!half) return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

struct MmaOperands {
  float* d;
  std::array<std::uint32_t, 4> a;
  std::array<std::uint32_t, 2> b;
};

// D[16, 8] += A[16, 16] @ B[16, 8]; see mma.cuh for who holds what.
inline void mma_m16n8k16(float (&d)[4], const std::array<std::uint32_t, 4>& a,
                         const std::array<std::uint32_t, 2>& b, bool half) {
  MmaOperands own = {d, a, b};
  collective(half ? "mma.f16" : "mma.bf16", 0xffffffffu, own,
             [half](MmaOperands* const(&lanes)[kWarpSize]) {
               float left[16][16], right[16][8], sums[16][8] = {};
               const auto split = [half](std::uint32_t pair, float& low, float& high) {
                 low = half_to_float(static_cast<std::uint16_t>(pair), half);
                 high = half_to_float(static_cast<std::uint16_t>(pair >> 16), half);
               };
               for (int lane = 0; lane < kWarpSize; ++lane) {
                 const int g = lane / 4, t = lane % 4;
                 for (int i = 0; i < 4; ++i) {
                   float* const place = &left[g + i % 2 * 8][2 * t + i / 2 * 8];
                   split(lanes[lane]->a[i], place[0], place[1]);
                 }
                 for (int i = 0; i < 2; ++i) {
                   const int k = 2 * t + i * 8;
                   split(lanes[lane]->b[i], right[k][g], right[k + 1][g]);
                 }
               }
               for (int row = 0; row < 16; ++row) {
                 for (int k = 0; k < 16; ++k) {
                   for (int column = 0; column < 8; ++column) {
                     sums[row][column] += left[row][k] * right[k][column];
                   }
                 }
               }
               for (int lane = 0; lane < kWarpSize; ++lane) {
                 for (int i = 0; i < 4; ++i) {
                   lanes[lane]->d[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
                 }
               }
             });
}

}  // namespace dynabert::emulation
