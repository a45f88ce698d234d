// Matrix products on a prefix of the weights, for every card from sm_80; bfloat16 or float16,
// accumulated and finished in float.
//
// Letters as in csrc/layout.h, T tokens. Nothing is allocated and nothing waits on the host;
// launches may be captured in a graph. Tensors are row-major and start at a multiple of 16 bytes;
// strides are in elements, multiples of 8. Equal rows give equal bits, whatever the tokens beside
// them: every sum runs over K in one order, in one register.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "row_tiles.h"
#include "tile_schedule.h"
#include "types.h"

namespace dynabert {

// Rows: out[t, n] = activation(sum_c x[t, c] * weight[n, c] + bias[n]) for n < width. `out` beyond
// the width is left as it was. QKV: weight [H, 3, D, C] seen as [H * 3 * D, C], unit 3 * D. Up:
// weight [I, C], unit 1.
//
// Columns: out[t, c] = sum_n x[t, n] * weight[n, c] + bias[c] for n < width. Neither x nor the
// weight is read beyond it. Out: weight [H, D, C] seen as [H * D, C], unit D. Down: weight [I, C].
struct GemmSm80 {
  ElementType type;       // of x, weight, bias and out: kBfloat16 or kFloat16
  Activation activation;  // of the rows form; kNone for columns
  const void* x;          // [T, C]; columns: [T, >= width]
  const void* weight;     // [full_width, C]
  const void* bias;       // [full_width]; columns: [C]
  void* out;              // [T, >= width]; columns: [T, C]
  std::int64_t x_stride;
  std::int64_t out_stride;
  std::int32_t tokens;
  std::int32_t hidden_size;  // C, a multiple of 8
  std::int32_t full_width;   // rows of the weight; what device memory holds is clamped to it
  PrefixWidth width;         // of all rows, if `tiles` is null; else `unit` alone is used
  const RowTile* tiles;      // [num_tiles] in device memory, by build_row_tiles, or null
  std::int32_t num_tiles;    // 0 without tiles
  std::int32_t tile_rows;    // that they were built with, 64 or 128; 0 without tiles
};

cudaError_t gemm_rows_sm80(const GemmSm80& args, cudaStream_t stream);
cudaError_t gemm_columns_sm80(const GemmSm80& args, cudaStream_t stream);

}  // namespace dynabert
