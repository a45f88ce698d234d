// The parts of the matrix products that need no GPU, as plain C++: tile schedule, ring, GELU.
// g++ -std=c++20 -O2 -x c++ gemm_schedule_test.cu -o gemm_schedule_test && ./gemm_schedule_test

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../activation.cuh"
#include "../tile_schedule.h"

namespace {

using dynabert::PrefixWidth;
using dynabert::RingPosition;
using dynabert::TileOrigin;
using dynabert::TileSchedule;
using dynabert::TileShape;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

constexpr TileShape kShapes[] = {{128, 192, 2, 1}, {128, 192, 1, 4}, {128, 192, 1, 1}};

// Every element of the output lies in exactly one tile, whatever the number of groups.
void test_tiles_cover_the_output_once() {
  for (const TileShape& shape : kShapes) {
    for (const std::int32_t rows : {1, 127, 128, 129, 1000, 16384}) {
      for (const std::int32_t columns : {64, 192, 576, 768, 1000, 3072}) {
        for (const std::int32_t groups : {1, 33, 66}) {
          const TileSchedule schedule(shape, rows, columns);
          const std::int32_t tiles_down = (rows + shape.rows - 1) / shape.rows;
          const std::int32_t tiles_across = (columns + shape.columns - 1) / shape.columns;
          std::vector<int> seen(static_cast<std::size_t>(tiles_down) * tiles_across, 0);
          for (std::int32_t group = 0; group < groups; ++group) {
            for (std::int32_t index = group; index < schedule.count; index += groups) {
              for (std::int32_t rank = 0; rank < shape.group_rows * shape.group_columns; ++rank) {
                const TileOrigin origin = schedule.origin(index, rank);
                require(origin.row % shape.rows == 0 && origin.column % shape.columns == 0,
                        "a tile starts at a multiple of its shape");
                if (origin.row >= rows || origin.column >= columns) continue;
                ++seen[origin.row / shape.rows * tiles_across + origin.column / shape.columns];
              }
            }
          }
          for (const int count : seen) require(count == 1, "each tile belongs to one block");
        }
      }
    }
  }
}

// 2^21 tokens x 3072 neurons are 6.4e9 elements: rows and columns fit into int32, offsets do not.
void test_large_output() {
  const std::int32_t rows = 1 << 21, columns = 3072;
  const TileSchedule schedule(kShapes[0], rows, columns);
  require(schedule.count == rows / 256 * (columns / 192), "super-tiles of a large output");
  const TileOrigin last = schedule.origin(schedule.count - 1, 1);
  require(last.row == rows - 128 && last.column == columns - 192,
          "the last tile of a large output");
}

// A barrier as the hardware has it: it knows how many phases are complete, and a wait for a parity
// returns while the phase in progress has the other one.
struct Barrier {
  std::uint32_t completed = 0;
  bool passes(std::uint32_t parity) const { return (completed & 1) != parity; }
};

// Walks the producer and the two consumers of a block through the ring in random order, each
// waiting on parities alone, and checks that every consumer finds its own K blocks.
void test_ring(std::uint32_t k_blocks, std::uint32_t rounds, unsigned seed) {
  constexpr std::uint32_t kStages = 4;
  using Position = RingPosition<kStages>;
  Barrier full[kStages], empty[kStages], turn[2];
  std::uint32_t content[kStages] = {};
  Position in = {0};
  struct Consumer {
    std::uint32_t round, block = 0;
    bool has_turn = false;
  } consumers[2] = {{0}, {1}};
  std::uint32_t drained = 0, idle = 0;
  std::srand(seed);
  while (drained < k_blocks * rounds) {
    require(++idle < 10000, "producer or consumers can go on");
    const int agent = std::rand() % 3;
    if (agent == 2) {
      if (in.block == k_blocks * rounds) continue;
      if (!empty[in.stage()].passes(in.parity() ^ 1)) continue;
      require(in.block < drained + kStages, "a stage in use is never overwritten");
      content[in.stage()] = in.block;
      ++full[in.stage()].completed;
      ++in.block;
    } else {
      Consumer& self = consumers[agent];
      if (self.round >= rounds) continue;
      if (!self.has_turn) {
        if (!turn[agent].passes(dynabert::turn_parity(self.round))) continue;
        self.has_turn = true;
      }
      const Position position = {self.round * k_blocks + self.block};
      if (!full[position.stage()].passes(position.parity())) continue;
      require(content[position.stage()] == position.block && in.block > position.block,
              "a consumer finds its own block");
      if (self.block == k_blocks - 1) ++turn[1 - agent].completed;
      ++empty[position.stage()].completed;
      ++drained;
      if (++self.block == k_blocks) self = {self.round + 2, 0, false};
    }
    idle = 0;
  }
}

void test_ring_wraps() {
  const RingPosition<4> before = {0xffffffffu}, after = {0};
  require(before.stage() == 3 && after.stage() == 0, "the stage goes on when the counter wraps");
  require(before.parity() == 1 && after.parity() == 0, "so does the parity");
}

void test_prefix_width() {
  const std::int32_t heads = 3;
  require(PrefixWidth{12, nullptr, 192}.rows() == 2304, "a width given as an argument");
  require(PrefixWidth{12, &heads, 192}.rows() == 576, "a width in device memory wins");
}

void test_gelu() {
  double largest = 0.0;
  for (int i = -200000; i <= 200000; ++i) {
    const float x = static_cast<float>(i) * 5e-5f;
    const double truth = 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    largest = std::fmax(largest, std::fabs(dynabert::gelu_erf(x) - truth));
  }
  require(largest < 1e-6, "gelu_erf is within 1e-6");
  require(dynabert::gelu_erf(-100.0f) == 0.0f && dynabert::gelu_erf(100.0f) == 100.0f,
          "gelu_erf at the ends");
  std::printf("largest error of gelu_erf: %.2g\n", largest);
}

}  // namespace

int main() {
  test_tiles_cover_the_output_once();
  test_large_output();
  for (unsigned seed = 0; seed < 50; ++seed) {
    for (const std::uint32_t k_blocks : {1, 2, 3, 4, 5, 12, 48}) test_ring(k_blocks, 25, seed);
  }
  test_ring_wraps();
  test_prefix_width();
  test_gelu();
  std::printf("passed\n");
}
