// The packed weight layout, mirrored from dynabert_kernels/layout.py (a test compares the two).
//
// Letters: H heads, D head_dim, C hidden_size, I intermediate_size; a digit is a fixed size.
// Every tensor whose shape begins with H or I is elastic: its first n rows are the prefix that a
// narrower call reads, contiguous in memory. The others do not change with width.

#pragma once

#include <cstdint>

namespace dynabert {

struct PackedTensor {
  const char* name;
  const char* shape;  // one character per dimension, outermost first
};

inline constexpr PackedTensor kAttentionLayout[] = {
    {"qkv_weight", "H3DC"}, {"qkv_bias", "H3D"},  {"out_weight", "HDC"},
    {"out_bias", "C"},      {"norm_weight", "C"}, {"norm_bias", "C"},
};

inline constexpr PackedTensor kFfnLayout[] = {
    {"up_weight", "IC"}, {"up_bias", "I"},     {"down_weight", "IC"},
    {"down_bias", "C"},  {"norm_weight", "C"}, {"norm_bias", "C"},
};

// Index on dimension 1 of qkv_weight and qkv_bias.
enum QkvPart : std::int64_t { kQuery = 0, kKey = 1, kValue = 2 };

}  // namespace dynabert
