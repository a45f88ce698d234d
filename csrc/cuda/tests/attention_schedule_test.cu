// The parts of the attention core that need no GPU, as plain C++: who computes which queries, and
// where rows lie in shared and global memory.
// g++ -std=c++20 -O2 -x c++ attention_schedule_test.cu -o attention_schedule_test

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "../../attention/attention_schedule.h"

namespace {

using namespace dynabert::core;
using dynabert::Widths;

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

std::vector<std::int32_t> offsets_of(const std::vector<std::int32_t>& lengths) {
  std::vector<std::int32_t> offsets = {0};
  for (const std::int32_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

// Every query of every sequence belongs to exactly one slot, and none beyond its sequence does.
void walk(const std::vector<std::int32_t>& lengths, std::int32_t slack, std::int32_t max_seqlen,
          std::int32_t tile_rows) {
  const std::vector<std::int32_t> offsets = offsets_of(lengths);
  const auto batch = static_cast<std::int32_t>(lengths.size());
  const std::int32_t tokens = offsets.back() + slack;
  const QuerySchedule schedule(batch, tokens, max_seqlen, tile_rows);
  require(schedule.slots <= tokens / tile_rows + std::int64_t{batch}, "few slots are idle");
  std::vector<int> seen(tokens, 0);
  for (std::int32_t slot = 0; slot < schedule.slots; ++slot) {
    const QueryTile tile = schedule.tile(offsets.data(), slot);
    require(tile.sequence >= 0 && tile.sequence < batch && tile.first >= 0,
            "a slot has a sequence");
    for (std::int64_t row = tile.first;
         row < tile.first + tile_rows && row < lengths[tile.sequence]; ++row) {
      ++seen[offsets[tile.sequence] + row];
    }
  }
  for (std::int32_t token = 0; token < tokens; ++token) {
    require(seen[token] == (token < offsets.back()), "each query belongs to one slot");
  }
}

void test_every_query_belongs_to_one_slot() {
  std::mt19937 generator(0);
  const auto uniform = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(generator);
  };
  for (int i = 0; i < 2000; ++i) {
    const int longest = 1 << uniform(0, 9);
    std::vector<std::int32_t> lengths(uniform(1, 40));
    for (std::int32_t& length : lengths) length = uniform(0, 3) == 0 ? 0 : uniform(0, longest);
    if (i % 3 == 0) lengths.assign(lengths.size(), longest);
    walk(lengths, uniform(0, 1) * uniform(0, 200), longest, 16 * uniform(1, 8));
  }
  walk({0}, 1, 1, 16);
  walk({0, 0, 0, 5}, 0, 5, 16);
  walk({512, 0, 0}, 0, 512, 128);
}

// Equal lengths need no search and leave no slot idle; a long sequence among short ones does not
// multiply the slots.
void test_slots_are_few() {
  require(QuerySchedule(128, 128 * 128, 128, 128).slots == 128, "a slot for each equal sequence");
  require(QuerySchedule(128, 128 * 128, 128, 128).tiles_per_sequence == 1, "found by division");
  require(QuerySchedule(128, 5000, 512, 128).slots == 5000 / 128 + 128, "found by search");
}

// 2^31 - 1 tokens: slots, queries and elements do not wrap.
void test_totals_beyond_int32() {
  const std::int32_t tokens = 0x7fffffff, half = 1 << 30;
  const std::vector<std::int32_t> offsets = {0, 5, half, half, tokens};
  for (const std::int32_t tile_rows : {16, 80, 128}) {
    const QuerySchedule schedule(4, tokens, half, tile_rows);
    std::int64_t last_sequence = -1, last_first = 0;
    for (std::int64_t slot : {std::int64_t{0}, schedule.slots / 2, schedule.slots - 1}) {
      const QueryTile tile = schedule.tile(offsets.data(), static_cast<std::int32_t>(slot));
      require(tile.first >= 0 && (tile.sequence > last_sequence || tile.first > last_first),
              "slots of many tokens ascend");
      last_sequence = tile.sequence, last_first = tile.first;
    }
    const std::int64_t last =
        schedule.first_slot(offsets.data(), 3) + (tokens - half - 1) / tile_rows;
    const QueryTile tile = schedule.tile(offsets.data(), static_cast<std::int32_t>(last));
    require(last < schedule.slots && tile.sequence == 3, "the last queries have a slot");
    require(tile.first <= tokens - half - 1 && tile.first + tile_rows > tokens - half - 1,
            "which holds them");
  }
  // 16 heads of 3 x 64: 3072 elements a token, two bytes each.
  require(row_offset(tokens, 6144, 47, 128) == 13194139533312 - 6144 + 6016, "bytes of an element");
}

void test_block_shapes() {
  for (const std::int32_t head_dim : {32, 64, 80, 128}) {
    for (std::int32_t longest = 1; longest <= 600; ++longest) {
      for (const std::int32_t batch : {1, 8, 300}) {
        const BlockShape shape = block_shape(longest, batch, batch * longest, 12, head_dim, 132);
        const bool streams = longest > kShortLength;
        require(shape.warps >= 1 && shape.warps <= max_warps(head_dim), "warps of a block");
        require(shape.tile_rows % kWarpRows == 0 && shape.tile_rows <= 128, "queries of a block");
        require(shape.tile_rows >= shape.warps * kWarpRows, "every warp has a first turn");
        require(!streams || shape.tile_rows == shape.warps * kWarpRows, "and no other in streams");
        require(shape.key_rows % kKeySpan == 0, "whole spans of keys");
        require(shape.key_rows >= (streams ? 2 * kStreamedKeys : longest), "keys have room");
      }
    }
  }
  require(block_shape(20, 64, 1280, 12, 64, 132).warps == 2, "short sequences get small blocks");
  require(block_shape(128, 1, 128, 12, 64, 132).tile_rows == 64, "few sequences get more blocks");
  require(block_shape(128, 128, 16384, 12, 64, 132).tile_rows == 128, "many share their keys");
}

// Pieces of different rows do not overlap, and what one instruction reads or writes lies in all
// banks: eight rows of a matrix, eight neighbouring pieces of a copy.
template <int kHeadDim>
void test_shared_rows() {
  using Rows = SharedRows<kHeadDim>;
  std::set<std::uint32_t> seen;
  for (std::int32_t row = 0; row < 128; ++row) {
    for (std::int32_t piece = 0; piece < Rows::kPieces; ++piece) {
      const std::uint32_t offset = Rows::offset(row, piece);
      require(offset % 16 == 0 && offset < 128u * Rows::kBytes, "a piece lies in the tile");
      require(seen.insert(offset).second, "no two pieces share a place");
      for (std::int32_t more = 2; piece < 2 && piece + more < Rows::kPieces; more += 2) {
        require(Rows::advance(offset, more) == Rows::offset(row, piece + more),
                "pieces are found from each other");
      }
    }
  }
  for (std::int32_t row = 0; row < 128; row += 8) {
    for (std::int32_t piece = 0; piece < Rows::kPieces; ++piece) {
      std::set<std::uint32_t> banks;
      for (std::int32_t i = 0; i < 8; ++i) banks.insert(Rows::offset(row + i, piece) / 16 % 8);
      require(banks.size() == 8, "eight rows at one piece lie in different banks");
    }
  }
}

void test_widths() {
  const std::int32_t each[] = {3, -1, 99};
  require(width_of({12, nullptr, 0}, 2) == 12, "one width for all");
  require(width_of({12, each, 1}, 2) == 3, "one width in device memory");
  require(width_of({12, each, 3}, 1) <= 0 && width_of({12, each, 3}, 2) == 12, "one for each");
}

}  // namespace

int main() {
  test_every_query_belongs_to_one_slot();
  test_slots_are_few();
  test_totals_beyond_int32();
  test_block_shapes();
  test_shared_rows<32>();
  test_shared_rows<64>();
  test_shared_rows<80>();
  test_shared_rows<128>();
  test_widths();
  std::printf("passed\n");
}
