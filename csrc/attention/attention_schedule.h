// Which block of the attention core has which queries, and where in memory they lie. Plain C++ as
// well as device code, so that a test on the CPU can walk the whole schedule.

#pragma once

#include <cstdint>

#include "../cuda/tile_schedule.h"
#include "../cuda/types.h"

namespace dynabert::core {

inline constexpr std::int32_t kWarpRows = 16;      // queries of a warp at a time
inline constexpr std::int32_t kShortLength = 128;  // keys that are all resident, one softmax
inline constexpr std::int32_t kStreamedKeys = 64;  // of a tile of longer sequences
inline constexpr std::int32_t kKeySpan = 32;       // keys are computed in whole spans
static_assert(kShortLength == 2 * kStreamedKeys, "both forms fill the same shared memory");

// Warps of a block. Long heads take more registers a thread, of which a multiprocessor has 64 Ki.
DYNABERT_HOST_DEVICE constexpr std::int32_t max_warps(std::int32_t head_dim) {
  return head_dim <= 64 ? 8 : 4;
}
// Blocks of max_warps that their registers let a multiprocessor hold: up to 128, 168 and 255.
DYNABERT_HOST_DEVICE constexpr std::int32_t resident_blocks(std::int32_t head_dim) {
  return head_dim == 80 ? 3 : 2;
}

// A query tile: rows [first, first + tile_rows) of a sequence, as far as it has them.
struct QueryTile {
  std::int32_t sequence;
  std::int64_t first;  // a row of the sequence; at or past its end for a slot without work
};

// Slots for query tiles, so that blocks find theirs without a table and the host need not know the
// lengths. Either every sequence has as many slots as the longest may need, or sequence i begins at
// slot offsets[i] / tile_rows + i, which leaves it enough and at most one or two to spare;
// whichever gives fewer. A block is one slot of one head; neighbours are the heads of a slot, whose
// rows are neighbours in memory.
struct QuerySchedule {
  std::int32_t batch;
  std::int32_t tile_rows;
  std::int32_t tiles_per_sequence;  // 0: searched for
  std::int64_t slots;

  DYNABERT_HOST_DEVICE QuerySchedule(std::int32_t batch, std::int32_t tokens,
                                     std::int32_t max_seqlen, std::int32_t tile_rows)
      : batch(batch), tile_rows(tile_rows), tiles_per_sequence(ceil_div(max_seqlen, tile_rows)) {
    slots = static_cast<std::int64_t>(batch) * tiles_per_sequence;
    const std::int64_t searched = tokens / tile_rows + static_cast<std::int64_t>(batch);
    if (searched < slots) {
      slots = searched;
      tiles_per_sequence = 0;
    }
  }

  DYNABERT_HOST_DEVICE std::int64_t first_slot(const std::int32_t* offsets,
                                               std::int32_t sequence) const {
    return offsets[sequence] / tile_rows + static_cast<std::int64_t>(sequence);
  }

  // offsets [batch + 1]: where sequences begin, ascending from 0.
  DYNABERT_HOST_DEVICE QueryTile tile(const std::int32_t* offsets, std::int32_t slot) const {
    if (tiles_per_sequence > 0) {
      return {slot / tiles_per_sequence, std::int64_t{slot % tiles_per_sequence} * tile_rows};
    }
    // The last sequence that begins at or before the slot; no two begin at the same. The comparison
    // of first_slot without its division.
    std::int32_t low = 0, high = batch;
    while (high - low > 1) {
      const std::int32_t middle = low + (high - low) / 2;
      if (offsets[middle] < (std::int64_t{slot} - middle + 1) * tile_rows) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return {low, (slot - first_slot(offsets, low)) * tile_rows};
  }
};

// How a call is cut into blocks.
struct BlockShape {
  std::int32_t warps;
  std::int32_t tile_rows;  // queries of a block; its warps take them 16 at a time, in turns
  std::int32_t key_rows;   // keys in shared memory, of both buffers where they are streamed
};

// Sequences of up to 64 get a block no larger than the longest needs, so that many are resident.
// Up to 128, four warps share the keys and go over the queries in two turns, unless that leaves
// multiprocessors idle. Beyond, queries stay with their warp while the keys stream by: the more
// warps share them, the less is read.
DYNABERT_HOST_DEVICE BlockShape block_shape(std::int32_t max_seqlen, std::int32_t batch,
                                            std::int32_t tokens, std::int32_t heads,
                                            std::int32_t head_dim, std::int32_t multiprocessors) {
  const std::int32_t needed = ceil_div(max_seqlen, kWarpRows);
  const bool streams = max_seqlen > kShortLength;
  const std::int32_t key_rows = streams ? kShortLength : ceil_div(max_seqlen, kKeySpan) * kKeySpan;
  if (needed <= 4) return {needed, needed * kWarpRows, key_rows};
  const std::int64_t warps =
      std::int64_t{multiprocessors} * resident_blocks(head_dim) * max_warps(head_dim);
  const std::int64_t blocks = QuerySchedule(batch, tokens, max_seqlen, 128).slots * heads;
  if (streams && max_warps(head_dim) >= 8 && blocks * 8 >= warps) return {8, 128, key_rows};
  if (!streams && blocks * 4 >= warps) return {4, needed * kWarpRows, key_rows};
  return {4, 64, key_rows};
}

// Heads of a sequence, at most the limit; none where it is below one.
DYNABERT_HOST_DEVICE std::int32_t width_of(const Widths& heads, std::int32_t sequence) {
  if (heads.each == nullptr) return heads.limit;
  const std::int32_t width = heads.each[heads.num_each > 1 ? sequence : 0];
  return width < heads.limit ? width : heads.limit;
}

// Rows of a tensor [tokens, heads, ...]: `stride` elements between tokens, `unit` between heads.
DYNABERT_HOST_DEVICE std::int64_t row_offset(std::int32_t token, std::int64_t stride,
                                             std::int32_t head, std::int32_t unit) {
  return token * stride + static_cast<std::int64_t>(head) * unit;
}

// A row of shared memory is head_dim elements in pieces of 16 bytes, such that eight rows at the
// same piece, and the pieces of a row, lie in different banks: an even number of pieces is permuted
// by the row where it is a power of two, else the row is one longer.
template <int kHeadDim>
struct SharedRows {
  static_assert(kHeadDim % 16 == 0 && kHeadDim >= 32, "a product takes 16 dimensions");
  static constexpr int kPieces = kHeadDim / 8;
  static constexpr bool kSwizzled = (kPieces & (kPieces - 1)) == 0;
  static constexpr int kBytes = (kPieces + !kSwizzled) * 16;  // between rows

  DYNABERT_HOST_DEVICE static std::uint32_t offset(std::int32_t row, std::int32_t piece) {
    const std::int32_t turn = !kSwizzled ? 0 : kPieces >= 8 ? row & 7 : row >> 1 & 3;
    return row * kBytes + (piece ^ turn) * 16;
  }

  // From the address of piece p to that of p + `pieces` in the same row, where p is below the
  // lowest bit set in `pieces`. Rows start at a multiple of their size.
  DYNABERT_HOST_DEVICE static std::uint32_t advance(std::uint32_t address, std::int32_t pieces) {
    return kSwizzled ? address ^ pieces * 16 : address + pieces * 16;
  }
};

}  // namespace dynabert::core
