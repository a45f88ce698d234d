// Puts matrices into panels (the format is in kernel_table.h).

#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"

namespace dynabert {

// A float32 matrix seen as [outputs][inputs], with any strides.
struct MatrixView {
  const float* data;
  std::int64_t outputs, inputs;
  std::int64_t output_stride, input_stride;  // elements
};

// Panels of 16 outputs, `panel_bytes` apart, [steps][16] units each. What the matrix does not fill
// up to round_up(outputs, 16) and `steps` is zero.
//   scales  [outputs], int8 only: what one step of the stored integer stands for
void pack_panels(const MatrixView& matrix, Compute compute, const float* scales, std::int64_t steps,
                 std::int64_t panel_bytes, std::byte* panels);

}  // namespace dynabert
