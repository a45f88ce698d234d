// How a call's tokens are shared among threads, and the checks both ops make of their arguments.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynabert {

// Rows [first, last) of a batch at one width: what one thread works on at a time.
struct TokenBlock {
  std::int64_t first, last;
  std::int64_t width;  // heads or neurons
};

// Whether there are too few tokens to give each thread some of its own: weights then cost more than
// products, and each thread reads its own share of them.
bool shares_weights(std::int64_t tokens);

// Cuts the batch into blocks, in order. `widths` holds one width per sequence; a block has only
// one. No result depends on the cut: every row is computed alone, its sums in one order.
std::vector<TokenBlock> token_blocks(std::int64_t tokens, std::int64_t width,
                                     const std::int32_t* widths, const std::int32_t* cu_seqlens,
                                     std::int64_t batch_size);

Compute parse_compute(const char* who, const std::string& name);
Activation parse_activation(const char* who, const std::string& name);
Element element_of(const char* who, const at::Tensor& hidden);

// Throws unless `tensor` is on the CPU with this shape (-1: any size).
void check_shape(const char* who, const char* name, const at::Tensor& tensor,
                 at::IntArrayRef shape);
// Throws unless offsets run from 0 to `tokens` without falling back.
void check_offsets(const char* who, const at::Tensor& cu_seqlens, std::int64_t tokens);
// Throws unless each of `widths`, one per sequence, is 1 to `limit`.
void check_widths(const char* who, const char* name, const at::Tensor& widths,
                  std::int64_t batch_size, std::int64_t limit);
void check_width(const char* who, const char* name, std::int64_t width, std::int64_t limit);

}  // namespace dynabert
