// Products of a warpgroup. They are carried out between the instruction and the wait, at a time
// that is drawn: operands may be read late, when a stage was released too early, or at once.

#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "grid.h"
#include "meet.h"
#include "shared.h"
#include "tensor_map.h"

namespace dynabert::emulation {

// Bits 0-13 address, 16-29 leading, 32-45 stride, all in 16 bytes; 62-63 the swizzle.
struct MatrixDescriptor {
  std::uint32_t address, leading, stride;
  std::uint32_t swizzle_bits;
  std::uint32_t line;  // bytes of a row

  explicit MatrixDescriptor(std::uint64_t bits) {
    const auto field = [bits](int shift) {
      return static_cast<std::uint32_t>(bits >> shift & 0x3fff) << 4;
    };
    address = field(0);
    leading = field(16);
    stride = field(32);
    switch (bits >> 62) {
      case 1:
        swizzle_bits = 3, line = 128;
        break;
      case 2:
        swizzle_bits = 2, line = 64;
        break;
      case 3:
        swizzle_bits = 1, line = 32;
        break;
      default:
        fail("wgmma: a descriptor without a swizzle");
    }
    if ((bits >> 49 & 7) != 0) fail("wgmma: a descriptor with a base offset");
  }

  // K innermost: element (outer, k), 16 K values.
  std::uint32_t row_major(int outer, int k) const {
    return swizzle(address + outer / 8 * stride + outer % 8 * line + k * 2, swizzle_bits);
  }
  // The outer index innermost.
  std::uint32_t transposed(int outer, int k) const {
    const int per_line = static_cast<int>(line) / 2;
    return swizzle(
        address + outer / per_line * leading + k / 8 * stride + k % 8 * line + outer % per_line * 2,
        swizzle_bits);
  }
};

// Eight neighbouring bf16 numbers: swizzles move 16 bytes as a whole.
inline void read_eight(Block& block, std::uint32_t address, float (&to)[8]) {
  const unsigned char* const from = shared_bytes(block, address, 16, 16, "wgmma");
  for (int i = 0; i < 8; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
}

// This warp's 16 rows of D[64, N] += A[64, 16] @ B[16, N]; d as in wgmma.cuh.
template <int kColumns>
void multiply_warp(Block& block, int first_row, const MatrixDescriptor& a,
                   const MatrixDescriptor& b, bool accumulate, bool transpose_b,
                   const std::array<float*, kWarpSize>& d) {
  float left[16][16], right[16][kColumns], eight[8];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; k += 8) {
      read_eight(block, a.row_major(first_row + row, k), eight);
      for (int i = 0; i < 8; ++i) left[row][k + i] = eight[i];
    }
  }
  for (int column = 0; column < kColumns; column += transpose_b ? 8 : 1) {
    for (int k = 0; k < 16; k += transpose_b ? 1 : 8) {
      read_eight(block, transpose_b ? b.transposed(column, k) : b.row_major(column, k), eight);
      for (int i = 0; i < 8; ++i) {
        right[transpose_b ? k : k + i][transpose_b ? column + i : column] = eight[i];
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[kColumns] = {};
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < kColumns; ++column) {
        sums[column] += left[row][k] * right[k][column];
      }
    }
    for (int column = 0; column < kColumns; ++column) {
      float& to = d[row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row / 8 * 2 + column % 2];
      to = (accumulate ? to : 0.0f) + sums[column];
    }
  }
}

inline void finish_products(Warp& warp, std::size_t groups) {
  for (; groups > 0; --groups) {
    for (std::size_t i = 0; i < warp.product_groups.front(); ++i) {
      warp.products.front()();
      warp.products.pop_front();
    }
    warp.product_groups.pop_front();
  }
}

template <int kColumns>
void wgmma(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool accumulate,
           bool transpose_b) {
  struct Operands {
    float* d;
    std::uint64_t a, b;
    bool accumulate, transpose_b;
  } own = {d, a, b, accumulate, transpose_b};
  Warp& warp = this_warp();
  collective("wgmma", 0xffffffffu, own, [&](Operands* const(&lanes)[kWarpSize]) {
    std::array<float*, kWarpSize> registers;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Operands& other = *lanes[lane];
      if (other.a != a || other.b != b || other.accumulate != accumulate) {
        fail("wgmma: lanes disagree about the operands");
      }
      registers[lane] = other.d;
    }
    const int first_row = warp.index % 4 * 16;
    Block& block = *warp.block;
    const MatrixDescriptor left(a), right(b);
    warp.products.push_back([=, &block] {
      multiply_warp<kColumns>(block, first_row, left, right, accumulate, transpose_b, registers);
    });
    ++warp.uncommitted_products;
  });
}

inline void wgmma_commit() {
  Warp& warp = this_warp();
  char nothing = 0;
  collective("wgmma.commit_group", 0xffffffffu, nothing, [&](auto&) {
    warp.product_groups.push_back(warp.uncommitted_products);
    warp.uncommitted_products = 0;
    if (random_draw.below(2) == 0) finish_products(warp, warp.product_groups.size());
  });
}

inline void wgmma_wait(std::size_t pending) {
  Warp& warp = this_warp();
  char nothing = 0;
  collective("wgmma.wait_group", 0xffffffffu, nothing, [&](auto&) {
    const std::size_t groups = warp.product_groups.size();
    finish_products(warp, groups > pending ? groups - pending : 0);
  });
}

}  // namespace dynabert::emulation
