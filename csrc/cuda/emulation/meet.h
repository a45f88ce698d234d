// How threads meet: barriers of a block and of a cluster, instructions of a warp.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "grid.h"

namespace dynabert::emulation {

inline void release_barrier(NamedBarrier& barrier) {
  for (Thread* thread : barrier.waiting) scheduler->make_ready(*thread);
  barrier.waiting.clear();
  barrier.arrived = barrier.expected = 0;
}

inline void arrive_at_barrier(int id, int threads, bool waits) {
  Thread& self = this_thread();
  if (id < 0 || id >= kNamedBarriers) fail("named barrier %d: there are %d", id, kNamedBarriers);
  if (threads % kWarpSize != 0 && threads != this_block().live_threads) {
    fail("named barrier %d of %d threads: no whole warps", id, threads);
  }
  NamedBarrier& barrier = this_block().barriers[id];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail("named barrier %d: of %d threads here, of %d elsewhere", id, threads, barrier.expected);
  }
  barrier.expected = threads;
  const bool last = ++barrier.arrived == threads;
  if (waits && !last) {
    barrier.waiting.push_back(&self);
    scheduler->wait(id == 0 ? "__syncthreads" : "named barrier", id);
  } else if (last) {
    release_barrier(barrier);
  }
}

inline void sync_block() { arrive_at_barrier(0, this_block().live_threads, true); }

inline void release_cluster(Cluster& cluster) {
  if (cluster.arrived < cluster.live_threads) return;
  cluster.arrived = 0;
  ++cluster.generation;
  for (Thread* thread : cluster.waiting) scheduler->make_ready(*thread);
  cluster.waiting.clear();
}

inline void cluster_arrive() {
  Thread& self = this_thread();
  Cluster& cluster = *this_block().cluster;
  if (self.at_cluster) fail("arrives at the cluster's barrier twice without a wait");
  self.at_cluster = true;
  self.cluster_generation = cluster.generation;
  ++cluster.arrived;
  release_cluster(cluster);
}

inline void cluster_wait() {
  Thread& self = this_thread();
  Cluster& cluster = *this_block().cluster;
  if (!self.at_cluster) fail("waits at the cluster's barrier without having arrived");
  self.at_cluster = false;
  if (cluster.generation != self.cluster_generation) return;
  cluster.waiting.push_back(&self);
  scheduler->wait("the cluster's barrier", 0);
}

inline void Scheduler::exit_thread() {
  Thread& self = *running;
  Block& block = *self.warp->block;
  self.done = true;
  self.warp->ready &= ~(1u << self.lane);
  --block.live_threads;
  --block.cluster->live_threads;
  Cluster& cluster = *block.cluster;
  if (self.at_cluster && self.cluster_generation == cluster.generation) --cluster.arrived;
  if (cluster.arrived > 0) release_cluster(cluster);
  // __syncthreads meets the threads that have not ended.
  NamedBarrier& barrier = block.barriers[0];
  if (barrier.arrived > 0) {
    if (--barrier.expected == barrier.arrived) release_barrier(barrier);
  }
  // Its own stack is in use until the switch, and no other thread takes one meanwhile.
  if (!stacks.give_back(self.stack)) fail("the stack of %zu bytes is too small", Stacks::kBytes);
  if (--live_ == 0) {
    while (!events_.empty()) deliver();
    switch_context(self.context, program_);
  } else {
    switch_away(self);
  }
  std::abort();
}

// The lanes of `mask` meet with their operands; the last to come carries out the instruction for
// all: execute(Operands* const (&)[32]), null where a lane takes no part.
template <typename Operands, typename Execute>
void collective(const char* what, std::uint32_t mask, Operands& operands, const Execute& execute) {
  Thread& self = this_thread();
  Warp& warp = *self.warp;
  if ((mask >> self.lane & 1) == 0) fail("%s: mask %#x leaves out the caller's lane", what, mask);
  self.collective_mask = mask;
  self.operands = &operands;
  self.waits_for = what;
  warp.collective |= 1u << self.lane;
  if ((warp.collective & mask) != mask) {
    scheduler->wait(what, mask);
    return;
  }
  Operands* all[kWarpSize] = {};
  for (std::uint32_t left = mask; left != 0; left &= left - 1) {
    Thread& thread = warp.threads[std::countr_zero(left)];
    if (thread.collective_mask != mask ||
        (thread.waits_for != what && std::strcmp(thread.waits_for, what) != 0)) {
      fail("%s with mask %#x meets %s with mask %#x of lane %d", what, mask, thread.waits_for,
           thread.collective_mask, thread.lane);
    }
    all[thread.lane] = static_cast<Operands*>(thread.operands);
  }
  execute(all);
  warp.collective &= ~mask;
  warp.ready |= mask;
  self.waits_for = nullptr;
}

// Until others have changed something that `condition` looks at.
template <typename Condition>
void wait_until(const char* what, const Condition& condition) {
  this_thread();
  scheduler->wait_until(what, 0, condition);
}

// Where no operands meet.
inline void meet_warp(const char* what, std::uint32_t mask = 0xffffffffu) {
  char nothing = 0;
  collective(what, mask, nothing, [](auto&) {});
}

}  // namespace dynabert::emulation
