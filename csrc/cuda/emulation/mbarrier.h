// Barriers in shared memory that count arrivals and bytes, and addresses within a cluster.

#pragma once

#include <cstdint>
#include <cstring>

#include "grid.h"
#include "meet.h"
#include "shared.h"

namespace dynabert::emulation {

inline std::uint32_t cluster_rank() { return static_cast<std::uint32_t>(this_block().rank); }

inline std::uint32_t cluster_address(std::uint32_t address, std::uint32_t rank) {
  if (address >> kRankShift != 0) fail("mapa: address %#x is already of a cluster", address);
  if (rank >= this_block().cluster->blocks.size()) fail("mapa: the cluster has no block %u", rank);
  return (rank + 1) << kRankShift | address;
}

// What lies in the eight bytes of a barrier. Poison has kNever arrivals expected.
struct Mbarrier {
  static constexpr std::uint16_t kNever = 0xffff;
  std::uint16_t expected;
  std::uint16_t missing;
  std::int32_t bytes : 31;
  std::uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier_at(Block& block, std::uint32_t address) {
  auto& barrier =
      *reinterpret_cast<Mbarrier*>(shared_bytes(block, address, sizeof(Mbarrier), 8, "mbarrier"));
  if (barrier.expected == Mbarrier::kNever) fail("mbarrier %#x was never initialised", address);
  return barrier;
}

inline void mbarrier_init(std::uint32_t address, std::uint32_t arrivals) {
  const auto count = static_cast<std::uint16_t>(arrivals);
  const Mbarrier barrier = {count, count, 0, 0};
  std::memcpy(shared_bytes(address, sizeof(barrier), 8, "mbarrier.init"), &barrier,
              sizeof(barrier));
}

inline void complete_phase(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.expected;
}

// One arrival; `bytes` more are to come before the phase completes.
inline void mbarrier_arrive(std::uint32_t address, std::uint32_t bytes) {
  Mbarrier& barrier = mbarrier_at(block_of(address), address);
  if (barrier.missing == 0) fail("mbarrier %#x: more arrivals than it expects", address);
  barrier.bytes += static_cast<std::int32_t>(bytes);
  --barrier.missing;
  complete_phase(barrier);
}

inline void mbarrier_deliver(Block& block, std::uint32_t address, std::size_t bytes) {
  Mbarrier& barrier = mbarrier_at(block, address);
  barrier.bytes -= static_cast<std::int32_t>(bytes);
  complete_phase(barrier);
}

inline void mbarrier_wait(std::uint32_t address, std::uint32_t parity) {
  const Mbarrier& barrier = mbarrier_at(block_of(address), address);
  scheduler->wait_until("mbarrier", address, [&] { return barrier.phase != (parity & 1); });
}

}  // namespace dynabert::emulation
