#include "cpu/pack.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dynabert {
namespace {

void put(std::byte* at, Compute compute, float value, float inverse_scale) {
  switch (compute) {
    case Compute::kFloat32:
      std::memcpy(at, &value, sizeof value);
      break;
    case Compute::kBFloat16: {
      const c10::BFloat16 rounded(value);
      std::memcpy(at, &rounded.x, sizeof rounded.x);
      break;
    }
    case Compute::kInt8: {
      const float whole = std::clamp(std::nearbyint(value * inverse_scale), -127.0f, 127.0f);
      *at = static_cast<std::byte>(static_cast<int>(whole) + 128);
      break;
    }
  }
}

}  // namespace

void pack_panels(const MatrixView& matrix, Compute compute, const float* scales, std::int64_t steps,
                 std::int64_t panel_bytes, std::byte* panels) {
  const std::int64_t unit = per_unit(compute), size = 4 / unit;
  for (std::int64_t first = 0; first < matrix.outputs; first += kLanes) {
    std::byte* panel = panels + first / kLanes * panel_bytes;
    std::memset(panel, compute == Compute::kInt8 ? 128 : 0, steps * kStepBytes);
    const std::int64_t lanes = std::min(kLanes, matrix.outputs - first);
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const float* row = matrix.data + (first + lane) * matrix.output_stride;
      const float inverse = scales == nullptr ? 1.0f : 1.0f / scales[first + lane];
      for (std::int64_t k = 0; k < matrix.inputs; ++k) {
        put(panel + k / unit * kStepBytes + lane * 4 + k % unit * size, compute,
            row[k * matrix.input_stride], inverse);
      }
    }
  }
}

}  // namespace dynabert
