// Shared memory of the running block, and of its cluster's others.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "grid.h"

namespace dynabert::emulation {

// An address is 0x400 (what lies below belongs to the system) and the offset; one of another block
// of the cluster has that block's rank plus one in its upper bits.
inline constexpr std::uint32_t kSharedBegin = 0x400;
inline constexpr int kRankShift = 24;

inline unsigned char* shared_memory() { return this_block().memory; }

inline std::uint32_t shared_address(const void* pointer) {
  const Block& block = this_block();
  const auto* place = static_cast<const unsigned char*>(pointer);
  if (place < block.memory || place > block.memory + block.shared_bytes) {
    fail("shared_address: the pointer is not in the block's shared memory");
  }
  return kSharedBegin + static_cast<std::uint32_t>(place - block.memory);
}

inline Block& block_of(std::uint32_t address) {
  const std::uint32_t rank = address >> kRankShift;
  Block& own = this_block();
  if (rank == 0) return own;
  if (rank > own.cluster->blocks.size()) fail("shared address %#x is of no block", address);
  return *own.cluster->blocks[rank - 1];
}

// Bytes of a block's memory, checked.
inline unsigned char* shared_bytes(Block& block, std::uint32_t address, std::size_t bytes,
                                   std::size_t alignment, const char* what) {
  const std::uint32_t offset = address & ((1u << kRankShift) - 1);
  if (offset % alignment != 0) {
    fail("%s: shared address %#x is no multiple of %zu bytes", what, offset, alignment);
  }
  if (offset < kSharedBegin || offset - kSharedBegin + bytes > block.shared_bytes) {
    fail("%s: %zu bytes at shared address %#x, the block has %#zx from %#x on", what, bytes, offset,
         block.shared_bytes, kSharedBegin);
  }
  return block.memory + (offset - kSharedBegin);
}
inline unsigned char* shared_bytes(std::uint32_t address, std::size_t bytes, std::size_t alignment,
                                   const char* what) {
  return shared_bytes(block_of(address), address, bytes, alignment, what);
}

template <typename T>
T load_shared(std::uint32_t address) {
  T value;
  std::memcpy(&value, shared_bytes(address, sizeof(T), sizeof(T), "load from shared memory"),
              sizeof(T));
  return value;
}
template <typename T>
void store_shared(std::uint32_t address, const T& value) {
  std::memcpy(shared_bytes(address, sizeof(T), sizeof(T), "store to shared memory"), &value,
              sizeof(T));
}

// Copies of a thread (cp.async). They take place when they are waited for; until then the
// destination is poison, so that who reads too early, or refills what is still being read, gets
// NaN.

inline void copy_async(std::uint32_t shared, const void* global, std::uint32_t bytes) {
  if (bytes > 16) fail("cp.async: %u bytes, at most 16", bytes);
  std::memset(shared_bytes(shared, 16, 16, "cp.async"), kPoison, 16);
  check_global(global, bytes, 16, "cp.async");
  Thread& self = this_thread();
  self.copies.push_back({shared, global, bytes, self.copy_group});
}

inline void copy_async_commit() { ++this_thread().copy_group; }

inline void copy_async_wait(std::uint32_t pending) {
  Thread& self = this_thread();
  std::size_t done = 0;
  for (; done < self.copies.size(); ++done) {
    const PendingCopy& copy = self.copies[done];
    if (copy.group + pending >= self.copy_group) break;
    unsigned char* const destination = shared_bytes(copy.shared, 16, 16, "cp.async");
    std::memcpy(destination, copy.global, copy.bytes);
    std::memset(destination + copy.bytes, 0, 16 - copy.bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace dynabert::emulation
