// Which tile a block computes when, and where a block of K lies in the ring of shared memory.
// Plain C++ as well as device code, so that a test on the CPU can walk the whole schedule.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DYNABERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DYNABERT_HOST_DEVICE inline
#endif

namespace dynabert {

DYNABERT_HOST_DEVICE std::int32_t ceil_div(std::int32_t a, std::int32_t b) {
  return a / b + (a % b != 0);
}

struct TileShape {
  std::int32_t rows;           // of a tile
  std::int32_t columns;        // of a tile
  std::int32_t group_rows;     // tiles of a group of blocks, along the rows
  std::int32_t group_columns;  // and along the columns
};

// First row and column of a tile, in elements.
struct TileOrigin {
  std::int32_t row;
  std::int32_t column;
};

// The tiles of an output [rows, columns], handed to a fixed number of resident groups in turn:
// round i of group g is super-tile g + i * num_groups. Columns run fastest, so that the groups at
// work share a few row panels of the activations while the weight stays in L2.
struct TileSchedule {
  TileShape shape;
  std::int32_t column_groups;
  std::int32_t count;  // super-tiles

  DYNABERT_HOST_DEVICE TileSchedule(TileShape tile, std::int32_t rows, std::int32_t columns)
      : shape(tile) {
    const std::int32_t row_groups = ceil_div(rows, tile.rows * tile.group_rows);
    column_groups = ceil_div(columns, tile.columns * tile.group_columns);
    count = row_groups * column_groups;
  }

  // The tile of block `rank` of the group. A tile that lies outside the output is computed all the
  // same: the others need its share of the loads.
  DYNABERT_HOST_DEVICE TileOrigin origin(std::int32_t index, std::int32_t rank) const {
    const std::int32_t group = index / column_groups;
    const std::int32_t rank_row = rank / shape.group_columns;
    const std::int32_t rank_column = rank % shape.group_columns;
    return {(group * shape.group_rows + rank_row) * shape.rows,
            ((index - group * column_groups) * shape.group_columns + rank_column) * shape.columns};
  }
};

// Consumers take rounds in turn (0, 1, 0, ...); the ring carries the K blocks of all rounds one
// after the other, so a consumer knows where its next round begins without having seen the other's.
template <std::uint32_t kStages>
struct RingPosition {
  std::uint32_t block;  // K blocks since the start of the kernel; wraps harmlessly

  static_assert((kStages & (kStages - 1)) == 0, "the wrap of `block` must be a whole turn");

  DYNABERT_HOST_DEVICE std::uint32_t stage() const { return block % kStages; }
  // Of the phase in which the stage is full for this block.
  DYNABERT_HOST_DEVICE std::uint32_t parity() const { return block / kStages & 1; }
};

// Consumers take rounds in turn, so each of their own barriers sees every second round. The parity
// to wait for in `round` on a barrier that completes one phase per round of its consumer:
DYNABERT_HOST_DEVICE std::uint32_t consumer_phase(std::uint32_t round) { return round >> 1 & 1; }

// The same on the barrier by which the other consumer passes the turn. Round 0 waits for nobody.
DYNABERT_HOST_DEVICE std::uint32_t turn_parity(std::uint32_t round) {
  return consumer_phase(round) ^ (round & 1 ? 0u : 1u);
}

// A width read where the kernel runs: from the argument, or, if `device_count` is set, from device
// memory, so that one captured launch serves every width.
struct PrefixWidth {
  std::int32_t count;                // heads or neurons
  const std::int32_t* device_count;  // [1] or null
  std::int32_t unit;                 // rows of the weight per head or neuron

  DYNABERT_HOST_DEVICE std::int32_t rows() const {
    return (device_count != nullptr ? *device_count : count) * unit;
  }
};

}  // namespace dynabert
