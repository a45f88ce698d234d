// The persistent encoder's schedule on the CPU: every output is made exactly once, every K element
// is summed exactly once, and nothing exceeds the shared memory that was planned. Needs no GPU:
//   g++ -std=c++20 -x c++ encoder_schedule_test.cu && ./a.out

#include <cstdio>
#include <vector>

#include "../../encoder/encoder_schedule.h"

using namespace dynabert::encoder;

namespace {

int failures = 0;

void expect(bool condition, const char* what, Product product, int tokens, int n, int k) {
  if (condition) return;
  if (++failures <= 20) {
    std::printf("FAIL %s: product=%d tokens=%d n=%d k=%d\n", what, product, tokens, n, k);
  }
}

// A product as the kernel goes through it, with counters in place of arithmetic.
void check_product(Product product, int tokens, int n, int k, int blocks) {
  const ProductPlan plan = plan_product(product, tokens, n, k, blocks);
  auto require = [&](bool condition, const char* what) {
    expect(condition, what, product, tokens, n, k);
  };
  require(plan.columns > 0 && plan.columns % 8 == 0 && plan.columns <= kMaxColumns, "columns");
  require(!ends_in_norm(product) || (plan.columns % 16 == 0 && plan.slices <= kNormSlices),
          "LayerNorm slices");
  require(plan.part_depth % kTileDepth == 0 && plan.part_depth <= kMaxPartDepth, "part depth");
  require(plan.parts >= 1 && plan.parts <= plan.split && kClusterSize % plan.split == 0, "parts");
  require(plan.teams >= 1 && plan.slices * plan.teams * plan.split <= blocks, "groups");
  require(partial_stride(plan.columns) >= plan.columns && partial_stride(plan.columns) % 64 == 8,
          "partial stride");

  // Per tile of rows and column of the output: K elements that its blocks sum up.
  std::vector<int> depth(static_cast<std::size_t>(plan.row_tiles) * n, 0);
  std::vector<int> rows(static_cast<std::size_t>(plan.row_tiles) * n, 0);
  for (int block = 0; block < blocks; ++block) {
    const BlockTask task = block_task(plan, block, k);
    require(task.part == block % kClusterSize % plan.split, "a group lies within a cluster");
    require(task.depth == 0 || task.part < plan.parts, "parts past the last have nothing");
    require(task.depth > 0 || task.part >= plan.parts, "parts up to the last have something");
    if (!task.active) continue;
    for (int round = 0; round < plan.rounds(); ++round) {
      const int tile = task.team + round * plan.teams;
      if (tile >= plan.row_tiles) continue;
      for (int c = task.slice * plan.columns; c < (task.slice + 1) * plan.columns && c < n; ++c) {
        depth[static_cast<std::size_t>(tile) * n + c] += task.depth;
        rows[static_cast<std::size_t>(tile) * n + c] += kTileRows / plan.split;
      }
    }
  }
  for (std::size_t i = 0; i < depth.size(); ++i) {
    require(depth[i] == k, "K elements");
    require(rows[i] == kTileRows, "rows");
  }
}

void check_model(int tokens, int hidden_size, int head_dim, int max_heads, int max_intermediate) {
  constexpr int kBlocks = 120, kLimit = 227 * 1024, kTables = 48 * 136 + 512;
  const SharedPlan shared = plan_shared(tokens, hidden_size, head_dim, max_heads, max_intermediate,
                                        kBlocks, kTables, kLimit);
  auto check = [&](Product product, int n, int k) {
    check_product(product, tokens, n, k, kBlocks);
    const ProductPlan plan = plan_product(product, tokens, n, k, kBlocks);
    auto require = [&](bool condition, const char* what) {
      expect(condition, what, product, tokens, n, k);
    };
    require(weight_bytes(plan) <= shared.weight_capacity, "weights fit their buffer");
    require(kTileRows * plan.part_depth * 2 <= shared.weights[0], "activations fit");
    require(kTileRows * partial_stride(plan.columns) * 2 <= shared.weights[0], "sums fit");
    require(attention_bytes(head_dim) <= shared.weights[0], "attention fits");
    require(shared.weights[0] % 1024 == 0 && shared.weights[1] % 1024 == 0, "alignment");
    require(shared.weights[1] + shared.weight_capacity <= shared.norm[0], "buffers do not overlap");
  };
  for (int heads = 1; heads <= max_heads; ++heads) {
    check(kQkv, 3 * heads * head_dim, hidden_size);
    check(kOut, hidden_size, heads * head_dim);
  }
  for (int neurons = 16; neurons <= max_intermediate; neurons += neurons < 256 ? 16 : 208) {
    check(kUp, neurons, hidden_size);
    check(kDown, hidden_size, neurons);
  }
  check(kUp, max_intermediate, hidden_size);
  check(kDown, hidden_size, max_intermediate);
  expect(shared.total <= kLimit, "a block's shared memory", kQkv, tokens, hidden_size, head_dim);
  const bool base = hidden_size == 768 && head_dim == 64;
  expect(!base || shared.weights[0] != shared.weights[1], "BERT-base prefetches", kQkv, tokens,
         hidden_size, head_dim);
}

}  // namespace

int main() {
  int models = 0;
  for (int tokens : {1, 63, 64, 65, 128, 129, 200, 256, 384, 511, 512}) {
    for (int hidden_size = 128; hidden_size <= kMaxHiddenSize; hidden_size += 128) {
      for (int head_dim : {32, 64}) {
        check_model(tokens, hidden_size, head_dim, hidden_size / head_dim, 4 * hidden_size);
        ++models;
      }
    }
  }
  std::printf("%d models, %d failures\n", models, failures);
  return failures != 0;
}
