// Device memory: allocations that know their bounds.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

namespace dynabert::emulation {

// Ends the program with a message that names the running block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// All bits set: NaN in every floating-point type, -1 as an integer.
inline constexpr int kPoison = 0xff;

// What cudaMalloc gave. A program that never calls it (a Python module whose tensors belong to
// another allocator) has its accesses checked for alignment only.
class Allocations {
 public:
  void* allocate(std::size_t bytes) {
    const std::size_t padded = (bytes + 255) / 256 * 256 + 2 * kMargin;
    auto* memory = static_cast<unsigned char*>(std::aligned_alloc(256, padded));
    if (memory == nullptr) return nullptr;
    std::memset(memory, kPoison, padded);
    sizes_[address_of(memory + kMargin)] = bytes;
    return memory + kMargin;
  }

  // False for what was never allocated. Stores past either end are found here at the latest.
  bool release(void* pointer) {
    const auto found = sizes_.find(address_of(pointer));
    if (found == sizes_.end()) return false;
    const auto* begin = static_cast<unsigned char*>(pointer);
    const unsigned char* const end = begin + found->second;
    for (std::size_t i = 0; i < kMargin; ++i) {
      if (begin[-1 - static_cast<std::ptrdiff_t>(i)] != kPoison || end[i] != kPoison) {
        fail("a store outside an allocation of %zu bytes", found->second);
      }
    }
    sizes_.erase(found);
    std::free(static_cast<unsigned char*>(pointer) - kMargin);
    return true;
  }

  bool contains(const void* pointer, std::size_t bytes) const {
    if (sizes_.empty()) return true;
    auto after = sizes_.upper_bound(address_of(pointer));
    if (after == sizes_.begin()) return false;
    --after;
    return address_of(pointer) + bytes <= after->first + after->second;
  }

 private:
  static constexpr std::size_t kMargin = 256;

  static std::uintptr_t address_of(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
  }

  std::map<std::uintptr_t, std::size_t> sizes_;
};

inline Allocations allocations;

inline void check_global(const void* pointer, std::size_t bytes, std::size_t alignment,
                         const char* what) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0) {
    fail("%s: global address %p is no multiple of %zu bytes", what, pointer, alignment);
  }
  if (bytes > 0 && !allocations.contains(pointer, bytes)) {
    fail("%s: %zu bytes at global address %p lie outside every allocation", what, bytes, pointer);
  }
}

}  // namespace dynabert::emulation
