// Types that the calls of the CUDA kernels share. Plain C++.

#pragma once

#include <cstdint>

namespace dynabert {

enum class ElementType : std::int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// kGelu is by the error function.
enum class Activation : std::int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// Heads or neurons of a call: `limit` for all sequences, or what device memory holds when the
// kernel runs, clamped to 0..limit.
struct Widths {
  std::int32_t limit;        // none exceeds it; buffers have room for it; at most the weight's
  const std::int32_t* each;  // null, [1] or [batch] in device memory
  std::int32_t num_each;     // 0, 1 or batch
};

// Bytes of an element.
constexpr std::int32_t element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

}  // namespace dynabert
