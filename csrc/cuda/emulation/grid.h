// The threads of a grid as fibers, and how they meet: warps, blocks, clusters and their barriers.
//
// A thread runs until it waits for others; then another one that can run is drawn by a random
// number. Every order is therefore possible that the barriers allow (except within a stretch
// without any meeting), and a barrier that is missing shows for some seed. Within one program the
// draws depend on the seed alone (DYNABERT_EMULATION_SEED).

#pragma once

#include <vector_types.h>

#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"

// CUDA's variables, those of the running thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace dynabert::emulation {

inline constexpr int kWarpSize = 32;
inline constexpr int kNamedBarriers = 16;

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(0x2545f4914f6cdd1du + seed * 0x9e3779b97f4a7c15u) {}
  // 0 .. bound - 1
  std::uint32_t below(std::uint32_t bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<std::uint32_t>((state_ >> 32) * bound >> 32);
  }

 private:
  std::uint64_t state_;
};

inline Random random_draw = [] {
  const char* seed = std::getenv("DYNABERT_EMULATION_SEED");
  return Random(seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0);
}();

struct Warp;
struct Block;
struct Cluster;
struct StoredBox;

// A copy that has been asked for and not yet waited for.
struct PendingCopy {
  std::uint32_t shared;
  const void* global;
  std::uint32_t bytes;
  std::uint32_t group;
};

struct Thread {
  Context context;
  std::byte* stack = nullptr;
  Warp* warp = nullptr;
  uint3 index = {};
  int lane = 0;
  bool done = false;
  // What it waits for, for messages.
  const char* waits_for = nullptr;
  std::uint32_t detail = 0;
  // In a warp's collective: the lanes that take part and this lane's operands.
  std::uint32_t collective_mask = 0;
  void* operands = nullptr;
  // Waiting for something that no one announces: the scheduler asks.
  bool (*condition)(const void*) = nullptr;
  const void* condition_data = nullptr;
  // Copies into shared memory, in the order they were asked for.
  std::vector<PendingCopy> copies;
  std::uint32_t copy_group = 0;
  bool at_cluster = false;  // has arrived at the cluster's barrier and not waited
  std::uint32_t cluster_generation = 0;
  // Boxes on their way out (tensor_map.h).
  std::vector<std::shared_ptr<StoredBox>> stores;
  std::size_t committed_stores = 0;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  Thread threads[kWarpSize];
  // Bits of lanes.
  std::uint32_t ready = 0;
  std::uint32_t conditional = 0;
  std::uint32_t collective = 0;
  bool active = false;  // in the scheduler's list
  // Products of a warpgroup that are under way (wgmma.h), and how many each group has.
  std::deque<std::function<void()>> products;
  std::deque<std::size_t> product_groups;
  std::size_t uncommitted_products = 0;
};

struct NamedBarrier {
  int expected = 0;
  int arrived = 0;
  std::vector<Thread*> waiting;
};

struct Block {
  uint3 index = {};
  Cluster* cluster = nullptr;
  int rank = 0;
  int live_threads = 0;
  unsigned char* memory = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  NamedBarrier barriers[kNamedBarriers];

  ~Block() { std::free(memory); }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live_threads = 0;
  // Of the cluster's barrier.
  int arrived = 0;
  std::uint32_t generation = 0;
  std::vector<Thread*> waiting;
};

inline Thread* running = nullptr;

inline Thread& this_thread() {
  if (running == nullptr) fail("a device function was called outside a kernel");
  return *running;
}
inline Warp& this_warp() { return *this_thread().warp; }
inline Block& this_block() { return *this_warp().block; }

// Runs clusters that are resident at the same time.
class Scheduler {
 public:
  explicit Scheduler(const std::function<void()>& body) : body_(body) {}

  void run(std::vector<std::unique_ptr<Cluster>>& clusters) {
    for (const auto& cluster : clusters) {
      for (const auto& block : cluster->blocks) {
        for (const auto& warp : block->warps) start(*warp);
      }
    }
    clusters_ = &clusters;
    if (live_ > 0) {
      running = pick();
      enter(*running);
      switch_context(program_, running->context);
    }
    running = nullptr;
  }

  // The running thread waits until make_ready() names it.
  void wait(const char* what, std::uint32_t detail) {
    Thread& self = *running;
    self.waits_for = what;
    self.detail = detail;
    self.warp->ready &= ~(1u << self.lane);
    switch_away(self);
    self.waits_for = nullptr;
  }

  void make_ready(Thread& thread) {
    thread.warp->ready |= 1u << thread.lane;
    activate(*thread.warp);
  }

  // Waits until `condition` holds; others change what it looks at.
  template <typename Condition>
  void wait_until(const char* what, std::uint32_t detail, const Condition& condition) {
    if (condition()) return;
    Thread& self = *running;
    self.condition = [](const void* data) { return (*static_cast<const Condition*>(data))(); };
    self.condition_data = &condition;
    self.warp->conditional |= 1u << self.lane;
    wait(what, detail);
  }

  // Something the hardware does on its own, at a time of its choosing.
  void later(std::function<void()> event) { events_.push_back(std::move(event)); }

  const std::function<void()>& body() const { return body_; }

  // The running thread's function has returned.
  [[noreturn]] void exit_thread();

 private:
  static void thread_main();

  void start(Warp& warp) {
    for (Thread& thread : warp.threads) {
      if (thread.done) continue;
      thread.stack = stacks.take();
      prepare_context(thread.context, thread.stack, thread_main);
      warp.ready |= 1u << thread.lane;
      ++live_;
    }
    activate(warp);
  }

  void activate(Warp& warp) {
    if (warp.active) return;
    warp.active = true;
    active_.push_back(&warp);
  }

  void enter(Thread& thread) {
    threadIdx = thread.index;
    blockIdx = thread.warp->block->index;
  }

  void switch_away(Thread& from) {
    Thread* const next = pick();
    if (next == &from) return;
    running = next;
    enter(*next);
    switch_context(from.context, next->context);
  }

  Thread* pick() {
    // Stretches of very different length for one warp: a barrier that is missing shows when one
    // runs far ahead of another.
    if (current_ != nullptr && turns_ > 0 && current_->ready != 0) {
      --turns_;
      return pick_lane(*current_);
    }
    turns_ = 1u << random_draw.below(11);
    deliver_some();
    while (true) {
      std::erase_if(active_, [](Warp* warp) {
        warp->active = warp->ready != 0 || warp->conditional != 0;
        return !warp->active;
      });
      const std::size_t begin = active_.empty() ? 0 : random_draw.below(active_.size());
      for (std::size_t i = 0; i < active_.size(); ++i) {
        Warp* const warp = active_[(begin + i) % active_.size()];
        ask_conditions(*warp);
        if (warp->ready == 0) continue;
        current_ = warp;
        return pick_lane(*warp);
      }
      if (events_.empty()) report_deadlock();
      deliver();
    }
  }

  static Thread* pick_lane(Warp& warp) {
    const int shift = static_cast<int>(random_draw.below(kWarpSize));
    const int lane = (std::countr_zero(std::rotr(warp.ready, shift)) + shift) % kWarpSize;
    return &warp.threads[lane];
  }

  static void ask_conditions(Warp& warp) {
    for (std::uint32_t left = warp.conditional; left != 0; left &= left - 1) {
      Thread& thread = warp.threads[std::countr_zero(left)];
      if (!thread.condition(thread.condition_data)) continue;
      warp.conditional &= ~(1u << thread.lane);
      warp.ready |= 1u << thread.lane;
    }
  }

  void deliver_some() {
    while (!events_.empty() && random_draw.below(4) == 0) deliver();
  }
  void deliver() {
    const std::size_t which = random_draw.below(events_.size());
    const std::function<void()> event = std::move(events_[which]);
    events_[which] = std::move(events_.back());
    events_.pop_back();
    event();
  }

  [[noreturn]] void report_deadlock();

  const std::function<void()>& body_;
  std::vector<std::unique_ptr<Cluster>>* clusters_ = nullptr;
  std::vector<Warp*> active_;
  std::vector<std::function<void()>> events_;
  Warp* current_ = nullptr;
  std::uint32_t turns_ = 0;
  std::size_t live_ = 0;
  Context program_;
};

inline Scheduler* scheduler = nullptr;

inline std::string name_of(const Thread& thread) {
  const uint3 block = thread.warp->block->index;
  char text[128];
  std::snprintf(text, sizeof(text), "block (%u, %u, %u) thread (%u, %u, %u)", block.x, block.y,
                block.z, thread.index.x, thread.index.y, thread.index.z);
  return text;
}

inline void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulated device: ");
  if (running != nullptr) std::fprintf(stderr, "%s: ", name_of(*running).c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

inline void Scheduler::thread_main() {
  scheduler->body()();
  scheduler->exit_thread();
}

inline void Scheduler::report_deadlock() {
  running = nullptr;
  std::fprintf(stderr, "emulated device: no thread can go on\n");
  // Neighbours that wait for the same are one line.
  int lines = 0;
  for (const auto& cluster : *clusters_) {
    for (const auto& block : cluster->blocks) {
      const Thread* first = nullptr;
      const Thread* last = nullptr;
      const auto print = [&] {
        if (first == nullptr || ++lines > 40) return;
        std::fprintf(stderr, "  %s", name_of(*first).c_str());
        if (last != first) {
          std::fprintf(stderr, " to (%u, %u, %u)", last->index.x, last->index.y, last->index.z);
        }
        std::fprintf(stderr, ": waits for %s", first->waits_for);
        if (first->detail != 0) std::fprintf(stderr, " %#x", first->detail);
        std::fprintf(stderr, "\n");
      };
      for (const auto& warp : block->warps) {
        for (const Thread& thread : warp->threads) {
          if (thread.done) continue;
          if (first != nullptr && std::strcmp(first->waits_for, thread.waits_for) == 0 &&
              first->detail == thread.detail) {
            last = &thread;
            continue;
          }
          print();
          first = last = &thread;
        }
      }
      print();
    }
  }
  fail("deadlock");
}

}  // namespace dynabert::emulation
