// Batches of mixed widths: the rows cut into tiles of one width each.
//
// Neighbouring sequences of equal width form a run, and a run is cut into tiles, so a batch sorted
// by width has few partial tiles. Plain C++ as well as device code; row_tiles.h builds the table.

#pragma once

#include <cstdint>

#include "tile_schedule.h"

namespace dynabert {

struct RowTile {
  std::int32_t begin;  // rows begin..end of the batch
  std::int32_t end;
  std::int32_t width;  // heads or neurons of all of them
};

// Entries that a table needs: every run has at most one partial tile, a run at least one sequence.
DYNABERT_HOST_DEVICE std::int32_t max_row_tiles(std::int32_t tokens, std::int32_t batch,
                                                std::int32_t tile_rows) {
  return ceil_div(tokens, tile_rows) + batch;
}

// Rows of a tile. Shorter tiles waste less where runs may be as short as a sequence.
DYNABERT_HOST_DEVICE std::int32_t row_tile_rows(std::int32_t tokens, std::int32_t batch) {
  return tokens / batch >= 96 ? 128 : 64;
}

// Tile `index` of the run that has the rows begin..end.
DYNABERT_HOST_DEVICE RowTile tile_of_run(std::int32_t begin, std::int32_t end, std::int32_t width,
                                         std::int32_t index, std::int32_t tile_rows) {
  const std::int32_t first = begin + index * tile_rows;
  return {first, end - first < tile_rows ? end : first + tile_rows, width};
}

}  // namespace dynabert
