// The parts of the sm_80 products that need no GPU, as plain C++: order of the tiles, their shape,
// swizzled shared memory, row tiles, activations.
// g++ -std=c++20 -O2 -x c++ gemm_sm80_schedule_test.cu -o schedule_test && ./schedule_test

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <set>
#include <vector>

#include "../activation.cuh"
#include "../gemm_sm80_schedule.h"
#include "../row_tile_schedule.h"

namespace {

using dynabert::BandedOrder;
using dynabert::GemmTile;
using dynabert::RowTile;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void test_every_tile_has_one_block() {
  for (const std::int32_t rows : {1, 2, 7, 8, 9, 16, 17, 100}) {
    for (const std::int32_t columns : {1, 2, 6, 24, 49}) {
      const BandedOrder order = {rows, columns};
      std::vector<int> seen(static_cast<std::size_t>(order.count()), 0);
      for (std::int32_t i = 0; i < order.count(); ++i) {
        const auto [row, column] = order.position(i);
        require(row >= 0 && row < rows && column >= 0 && column < columns, "a tile of the output");
        ++seen[row * columns + column];
      }
      for (const int count : seen) require(count == 1, "each tile belongs to one block");
    }
  }
}

// While one band is worked on, each column tile of the weight is used up before the next.
void test_bands_use_a_weight_tile_up() {
  const BandedOrder order = {20, 6};
  for (std::int32_t i = 1; i < order.count(); ++i) {
    const auto before = order.position(i - 1), at = order.position(i);
    const bool same_band = before.row_tile / 8 == at.row_tile / 8;
    require(!same_band || before.column_tile <= at.column_tile, "columns ascend in a band");
    require(before.row_tile / 8 <= at.row_tile / 8, "bands ascend");
  }
}

// 2^21 tokens x 3072 neurons are 6.4e9 elements: rows, columns and tiles fit into int32.
void test_large_output() {
  const std::int32_t tokens = 1 << 21, columns = 3072;
  for (const GemmTile& tile : dynabert::kGemmTiles) {
    const BandedOrder order = {dynabert::ceil_div(tokens, tile.rows),
                               dynabert::ceil_div(columns, tile.columns)};
    require(order.count() * tile.rows * tile.columns == std::int64_t{tokens} * columns,
            "the tiles of a large output");
    const auto last = order.position(static_cast<std::int32_t>(order.count() - 1));
    require(std::int64_t{last.row_tile + 1} * tile.rows == tokens &&
                (last.column_tile + 1) * tile.columns == columns,
            "the last tile of a large output");
  }
  const BandedOrder huge = {1 << 25, 1 << 10};
  require(huge.count() == std::int64_t{1} << 35,
          "too many tiles are counted, so that they can be "
          "refused");
}

std::int64_t busiest(const GemmTile& tile, std::int32_t tokens, std::int32_t columns, int cards) {
  const std::int64_t blocks = std::int64_t{dynabert::ceil_div(tokens, tile.rows)} *
                              dynabert::ceil_div(columns, tile.columns);
  return (blocks + cards - 1) / cards * tile.rows * tile.columns * tile.cost;
}

void test_choice_of_a_tile() {
  const auto rows_of = [](int tile) { return dynabert::kGemmTiles[tile].rows; };
  for (const int multiprocessors : {40, 108, 132}) {
    const auto choose = [=](std::int32_t tokens, std::int32_t columns, std::int32_t rows = 0) {
      return dynabert::choose_gemm_tile(tokens, columns, multiprocessors, rows);
    };
    require(choose(16384, 3072) == 0 && choose(16384, 768) == 0, "large tiles where all are busy");
    require(choose(128, 768) == 2 && choose(1, 64) == 2, "small tiles where few blocks would be");
    for (const std::int32_t tokens : {1, 100, 128, 700, 4096}) {
      for (const std::int32_t columns : {8, 192, 768, 2304, 3072}) {
        const GemmTile& chosen = dynabert::kGemmTiles[choose(tokens, columns)];
        for (const GemmTile& other : dynabert::kGemmTiles) {
          require(busiest(chosen, tokens, columns, multiprocessors) <=
                      busiest(other, tokens, columns, multiprocessors),
                  "no other tile is faster");
        }
        require(rows_of(choose(tokens, columns, 64)) == 64 && choose(tokens, columns, 128) == 0,
                "tiles with the rows of a table");
      }
    }
  }
}

// Every 16 bytes of a tile have a place of their own; eight rows of one chunk (a matrix load) and
// eight chunks in a row (a copy) fall on all 32 banks.
template <int kRowBytes>
void test_swizzle() {
  constexpr int kRows = 128, kChunks = kRowBytes / 16;
  std::set<std::uint32_t> places;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const std::uint32_t place = dynabert::swizzled<kRowBytes>(row, chunk);
      require(place % 16 == 0 && place < kRows * kRowBytes, "a place in the tile");
      require(places.insert(place).second, "no two chunks share a place");
      require(place == dynabert::swizzled<kRowBytes>(row % dynabert::kSwizzlePeriod, chunk) +
                           row / dynabert::kSwizzlePeriod * dynabert::kSwizzlePeriod * kRowBytes,
              "the twist repeats");
    }
  }
  for (int row = 0; row < kRows; row += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      std::set<std::uint32_t> banks;
      for (int i = 0; i < 8; ++i) {
        banks.insert(dynabert::swizzled<kRowBytes>(row + i, chunk) / 16 % 8);
      }
      require(banks.size() == 8, "a matrix load has no bank conflict");
    }
  }
  for (int first = 0; first < kRows * kChunks; first += 8) {
    std::set<std::uint32_t> banks;
    for (int i = first; i < first + 8; ++i) {
      banks.insert(dynabert::swizzled<kRowBytes>(i / kChunks, i % kChunks) / 16 % 8);
    }
    require(banks.size() == 8, "a copy has no bank conflict");
  }
}

void test_rows_in_use() {
  require(dynabert::rows_in_use(3, 192, 2304) == 576, "heads times rows of a head");
  require(dynabert::rows_in_use(100, 192, 2304) == 2304, "never more than the weight has");
  require(dynabert::rows_in_use(-1, 192, 2304) == 0, "never less than none");
  require(dynabert::rows_in_use(std::numeric_limits<std::int32_t>::max(), 192, 2304) == 2304,
          "no overflow before the clamp");
}

// Runs of random widths, cut up: every row in one tile, with its run's width.
void test_row_tiles() {
  std::srand(1);
  for (int round = 0; round < 200; ++round) {
    const std::int32_t tile_rows = round % 2 ? 64 : 128, batch = 1 + std::rand() % 20;
    std::vector<std::int32_t> width_of_row;
    std::vector<RowTile> tiles;
    std::int32_t begin = 0;
    for (std::int32_t run = 0; run < batch; ++run) {
      const std::int32_t end = begin + std::rand() % 400, width = std::rand() % 13;
      width_of_row.insert(width_of_row.end(), end - begin, width);
      for (std::int32_t i = 0; i < dynabert::ceil_div(end - begin, tile_rows); ++i) {
        tiles.push_back(dynabert::tile_of_run(begin, end, width, i, tile_rows));
      }
      begin = end;
    }
    require(
        static_cast<std::int32_t>(tiles.size()) <= dynabert::max_row_tiles(begin, batch, tile_rows),
        "the table has room");
    std::int32_t next = 0;
    for (const RowTile& tile : tiles) {
      require(tile.begin == next && tile.end > tile.begin && tile.end - tile.begin <= tile_rows,
              "tiles follow each other");
      for (std::int32_t row = tile.begin; row < tile.end; ++row) {
        require(width_of_row[row] == tile.width, "a tile has one width");
      }
      next = tile.end;
    }
    require(next == begin, "all rows have a tile");
  }
  const std::int32_t tokens = std::numeric_limits<std::int32_t>::max() - 200;
  const RowTile last = dynabert::tile_of_run(0, tokens, 5, (tokens - 1) / 128, 128);
  require(last.begin < last.end && last.end == tokens, "the last tile of 2^31 rows");
}

void test_activations() {
  double largest = 0.0;
  for (int i = -200000; i <= 200000; ++i) {
    const float x = static_cast<float>(i) * 5e-5f;
    const double u = std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * double{x} * x * x);
    largest =
        std::fmax(largest, std::fabs(dynabert::gelu_tanh(x) - 0.5 * x * (1.0 + std::tanh(u))));
  }
  require(largest < 1e-6, "gelu_tanh is within 1e-6");
  std::printf("largest error of gelu_tanh: %.2g\n", largest);
  require(dynabert::gelu_tanh(-1e30f) == 0.0f && dynabert::gelu_tanh(1e30f) == 1e30f,
          "gelu_tanh at the ends");
  require(dynabert::relu(-1.0f) == 0.0f && dynabert::relu(2.0f) == 2.0f, "relu");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  require(std::isnan(dynabert::gelu_tanh(nan)) && std::isnan(dynabert::relu(nan)) &&
              std::isnan(dynabert::gelu_erf(nan)),
          "a NaN stays a NaN");
}

}  // namespace

int main() {
  test_every_tile_has_one_block();
  test_bands_use_a_weight_tile_up();
  test_large_output();
  test_choice_of_a_tile();
  test_swizzle<64>();
  test_swizzle<128>();
  test_swizzle<256>();
  test_rows_in_use();
  test_row_tiles();
  test_activations();
  std::printf("passed\n");
}
