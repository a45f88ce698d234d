#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynabert {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kSmallestBlock = std::size_t{1} << 20;

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

struct Block {
  std::unique_ptr<std::byte, Free> data;
  std::size_t size;
};

// Blocks in the order they are used: pieces handed out stay where they are when more is needed.
struct Arena {
  std::vector<Block> blocks;
  std::size_t block = 0, used = 0;
};

Arena& arena() {
  thread_local Arena of_thread;
  return of_thread;
}

}  // namespace

ScratchFrame::ScratchFrame() : mark_block_(arena().block), mark_used_(arena().used) {}

ScratchFrame::~ScratchFrame() {
  Arena& a = arena();
  a.block = mark_block_;
  a.used = mark_used_;
}

void* ScratchFrame::take(std::size_t bytes) {
  Arena& a = arena();
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  while (a.block < a.blocks.size() && a.used + bytes > a.blocks[a.block].size) {
    ++a.block;
    a.used = 0;
  }
  if (a.block == a.blocks.size()) {
    std::size_t size = kSmallestBlock;
    while (size < bytes) size *= 2;
    auto* data = static_cast<std::byte*>(std::aligned_alloc(kAlignment, size));
    if (data == nullptr) throw std::bad_alloc();
    a.blocks.push_back({std::unique_ptr<std::byte, Free>(data), size});
    a.used = 0;
  }
  void* piece = a.blocks[a.block].data.get() + a.used;
  a.used += bytes;
  return piece;
}

}  // namespace dynabert
