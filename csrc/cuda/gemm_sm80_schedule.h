// Which tile of the product a block computes, where its parts lie in shared memory, and which shape
// of tile suits a call. Plain C++ as well as device code, so that a test on the CPU can walk it.

#pragma once

#include <cstdint>

#include "tile_schedule.h"

namespace dynabert {

// A block of four warps, two by two, computes rows x columns of the output, in steps of `depth`
// along K; `stages` of these are in shared memory at a time.
//
// All need 48 KiB, so that two blocks share a multiprocessor even where it has only 100 KiB, and
// the epilogue of one runs under the products of the other. `cost` is the time of one element in
// 1/8 of what it is in the largest tile: the cycles that shared memory needs for a tile's copies
// and fragments, divided by those of its products, by arithmetic for sm_80.
struct GemmTile {
  std::int32_t rows;
  std::int32_t columns;
  std::int32_t depth;
  std::int32_t stages;
  std::int32_t blocks;  // of a multiprocessor that the registers allow
  std::int32_t cost;
};

inline constexpr GemmTile kGemmTiles[] = {
    {128, 128, 32, 3, 2, 8}, {64, 128, 32, 4, 3, 9}, {64, 64, 64, 3, 4, 12}};
inline constexpr int kGemmTileCount = 3;

// The tile with the least time for the busiest multiprocessor, blocks being dealt one after the
// other. `tile_rows` other than 0 asks for tiles of so many rows.
inline int choose_gemm_tile(std::int32_t tokens, std::int32_t columns, int multiprocessors,
                            std::int32_t tile_rows = 0) {
  int best = kGemmTileCount - 1;
  std::int64_t best_time = INT64_MAX;
  for (int i = 0; i < kGemmTileCount; ++i) {
    const GemmTile& tile = kGemmTiles[i];
    if (tile_rows != 0 && tile.rows != tile_rows) continue;
    const std::int64_t blocks =
        static_cast<std::int64_t>(ceil_div(tokens, tile.rows)) * ceil_div(columns, tile.columns);
    const std::int64_t rounds = (blocks + multiprocessors - 1) / multiprocessors;
    const std::int64_t time = rounds * tile.rows * tile.columns * tile.cost;
    if (time < best_time) {
      best_time = time;
      best = i;
    }
  }
  return best;
}

// Blocks in the order in which they start: bands of eight row tiles, in a band all rows of a column
// tile before the next. A weight's tile serves a whole band while it is in L2, and is read from
// memory once per band at most.
struct BandedOrder {
  static constexpr std::int32_t kBandRows = 8;

  std::int32_t row_tiles;
  std::int32_t column_tiles;

  struct Position {
    std::int32_t row_tile;
    std::int32_t column_tile;
  };

  DYNABERT_HOST_DEVICE std::int64_t count() const {
    return static_cast<std::int64_t>(row_tiles) * column_tiles;
  }

  DYNABERT_HOST_DEVICE Position position(std::int32_t index) const {
    const std::int32_t band = index / (kBandRows * column_tiles);
    const std::int32_t first = band * kBandRows;
    const std::int32_t rows = row_tiles - first < kBandRows ? row_tiles - first : kBandRows;
    const std::int32_t within = index - first * column_tiles;
    return {first + within % rows, within / rows};
  }
};

// Byte offset of 16 bytes, `chunk` of `row`, in a tile whose rows are kRowBytes (64, 128 or 256).
// Eight rows of a matrix load fall on different banks: a row of 64 bytes covers half of them, so
// its pair decides; else the row itself.
template <std::int32_t kRowBytes>
DYNABERT_HOST_DEVICE std::uint32_t swizzled(std::int32_t row, std::int32_t chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256);
  const std::int32_t twist = kRowBytes == 64 ? row >> 1 & 3 : row & 7;
  return static_cast<std::uint32_t>(row * kRowBytes + (chunk ^ twist) * 16);
}

// Rows this far apart are twisted alike, so their offsets differ by a constant.
inline constexpr std::int32_t kSwizzlePeriod = 8;

// Rows of the weight in use: `count` heads or neurons, never more than the weight has.
DYNABERT_HOST_DEVICE std::int32_t rows_in_use(std::int32_t count, std::int32_t unit,
                                              std::int32_t full_width) {
  const std::int32_t limit = full_width / unit;
  return (count < 0 ? 0 : count > limit ? limit : count) * unit;
}

}  // namespace dynabert
