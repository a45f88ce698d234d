// Who does what in the persistent encoder kernel: plain integer arithmetic, so that it also
// compiles as C++ and is tested without a GPU.
//
// A thread block cluster of 8 works on every phase. For a product [tokens, K] x [K, N] the K axis
// is cut into `split` parts (2, 4 or 8), one per block of a group; a group is `split` neighbouring
// blocks of a cluster, which add up their parts through each other's shared memory. A group owns
// one slice of `columns` output columns and every `teams`-th tile of 64 rows, so its slice of the
// weights is loaded once, however many rows there are:
//
//      columns ->   slice 0   slice 1   slice 2  ...        group = team * slices + slice
//      rows 0..63    team 0    team 0    team 0
//      rows 64..127  team 1    team 1    team 1             with teams == 2: the tiles 0, 2, 4, ...
//      rows 128..    team 0    ...                          belong to team 0, the others to team 1
//
// All of it depends on shapes alone, never on timing, so equal inputs give equal bits.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DYNABERT_HOST_DEVICE __host__ __device__
#else
#define DYNABERT_HOST_DEVICE
#endif

namespace dynabert::encoder {

inline constexpr int kClusterSize = 8;
inline constexpr int kMaxClusters = 16;
inline constexpr int kTileRows = 64;       // rows of one warpgroup matrix instruction
inline constexpr int kTileDepth = 64;      // K elements of one shared-memory block: 128 bytes
inline constexpr int kMaxColumns = 128;    // output columns of a slice
inline constexpr int kMaxPartDepth = 512;  // K elements of a part
inline constexpr int kMaxTokens = 512;
inline constexpr int kMaxHiddenSize = 1024;
inline constexpr int kMaxIntermediate = 4096;
inline constexpr int kMaxLayers = 48;
inline constexpr int kNormSlices = 16;  // LayerNorm statistics come in at most 16 pieces a row
inline constexpr int kLoaderWarps = 8;

// The four products of a layer.
enum Product : int { kQkv = 0, kOut = 1, kUp = 2, kDown = 3 };

DYNABERT_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
DYNABERT_HOST_DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

DYNABERT_HOST_DEVICE constexpr bool ends_in_norm(Product product) {
  return product == kOut || product == kDown;
}

struct ProductPlan {
  std::int16_t split;       // blocks of a group
  std::int16_t part_depth;  // K elements of a part, a multiple of 64; the last may be short
  std::int16_t parts;       // parts that are not empty, at most split
  std::int16_t columns;     // output columns of a slice, a multiple of 8
  std::int16_t slices;
  std::int16_t teams;      // groups that share a slice, each with its own rows
  std::int16_t row_tiles;  // tiles of 64 rows

  // The longest list of row tiles that a group has: every block of the grid goes through this many
  // rounds, whether it has a tile in them or not, because clusters meet in each.
  DYNABERT_HOST_DEVICE constexpr int rounds() const { return ceil_div(row_tiles, teams); }
};

// Splits the product of `tokens` rows, `n` columns and depth `k` over `blocks` thread blocks.
//   n, k  multiples of 16
DYNABERT_HOST_DEVICE constexpr ProductPlan plan_product(Product product, int tokens, int n, int k,
                                                        int blocks) {
  ProductPlan plan{};
  plan.row_tiles = ceil_div(tokens, kTileRows);
  // Two teams: more would load the weights more often, one would leave each block twice the rows.
  for (plan.teams = plan.row_tiles < 2 ? 1 : 2; plan.teams >= 1; --plan.teams) {
    if (ends_in_norm(product)) {
      // The layout of transposed weights has blocks of 16 columns.
      plan.split = kClusterSize;
      plan.columns = round_up(ceil_div(n, blocks / plan.split / plan.teams), 16);
    } else {
      // The finer split costs more reduction and saves activations read by each block; it pays
      // while the slices stay narrow.
      plan.split = 4;
      plan.columns = round_up(ceil_div(n, blocks / 4 / plan.teams), 8);
      if (plan.columns > 72) {
        plan.split = 2;
        plan.columns = round_up(ceil_div(n, blocks / 2 / plan.teams), 8);
      }
    }
    if (plan.columns <= kMaxColumns) break;
  }
  plan.slices = ceil_div(n, plan.columns);
  plan.part_depth = round_up(ceil_div(k, plan.split), kTileDepth);
  plan.parts = ceil_div(k, plan.part_depth);
  return plan;
}

// What one block does in a product.
struct BlockTask {
  std::int16_t group;  // index of the group in the grid
  std::int16_t part;   // index of the block in its group
  std::int16_t slice;  // slice of columns
  std::int16_t team;
  std::int16_t depth_begin;
  std::int16_t depth;  // K elements of this block's part; 0: none
  bool active;         // false: the grid has more groups than the product needs
};

DYNABERT_HOST_DEVICE constexpr BlockTask block_task(const ProductPlan& plan, int block, int k) {
  BlockTask task{};
  task.group = block / plan.split;
  task.part = block % plan.split;
  task.active = task.group < plan.slices * plan.teams;
  task.slice = task.group % plan.slices;
  task.team = task.group / plan.slices;
  task.depth_begin = task.part * plan.part_depth;
  const int left = k - task.depth_begin;
  task.depth = left <= 0 ? 0 : (left < plan.part_depth ? left : plan.part_depth);
  return task;
}

// Blocks of K that are multiplied while the loaders prepare the rest.
DYNABERT_HOST_DEVICE constexpr int first_half(int blocks) { return ceil_div(blocks, 2); }

// fp16 numbers between two rows of a tile of partial sums: 16 bytes past a multiple of 128, so that
// the eight rows which a warp writes at once fall into different banks.
DYNABERT_HOST_DEVICE constexpr int partial_stride(int columns) {
  return columns + (((8 - columns) % 64) + 64) % 64;
}

// Bytes of a block's slice of the weights in shared memory.
DYNABERT_HOST_DEVICE constexpr int weight_bytes(const ProductPlan& plan) {
  return plan.columns * plan.part_depth * 2;
}

// Attention: the query rows of one item are 16 * query_groups; the 8 warps are query_groups groups,
// the warps of one sharing its keys. Long batches take more rows per item, since an item reads all
// keys of its sequence.
DYNABERT_HOST_DEVICE constexpr int query_groups(int tokens) {
  return tokens <= 128 ? 1 : (tokens <= 256 ? 2 : 4);
}

// One tile of query rows of one sequence; all numbers are below 2^10.
struct QueryTile {
  std::uint16_t row;    // first query row
  std::uint16_t begin;  // first row of the sequence
  std::uint16_t end;    // one past its last row
};

DYNABERT_HOST_DEVICE constexpr int attention_bytes(int head_dim) {
  // Per warp 16 rows of float output, padded as partial sums are, and 16 pairs (maximum, sum).
  return kLoaderWarps * 16 * (head_dim + 8) * 4 + kLoaderWarps * 16 * 8;
}

// Shared memory of a block, as offsets in bytes.
struct SharedPlan {
  int weights[2];  // the two weight buffers; equal if the card holds only one
  int weight_capacity;
  int norm[2];     // LayerNorm weight, then bias, of the columns of a part
  int norm_depth;  // numbers from weight to bias
  int tables;      // the layers, then the query tiles
  int total;
};

// Shared memory for a model whose layers have at most these sizes. Activations come first, at 0: a
// tile of A, later the partial sums, or what attention needs.
//   table_bytes  bytes that the tables take
//   limit        bytes that a block may have
constexpr SharedPlan plan_shared(int tokens, int hidden_size, int head_dim, int max_heads,
                                 int max_intermediate, int blocks, int table_bytes, int limit) {
  int activations = attention_bytes(head_dim);
  int weights = 0;
  auto include = [&](Product product, int n, int k) {
    const ProductPlan plan = plan_product(product, tokens, n, k, blocks);
    const int tile = kTileRows * plan.part_depth * 2;
    const int partial = kTileRows * partial_stride(plan.columns) * 2;
    const int bytes = weight_bytes(plan);
    activations = activations > tile ? activations : tile;
    activations = activations > partial ? activations : partial;
    weights = weights > bytes ? weights : bytes;
  };
  // A narrower call may take the other split and then need more than the widest one.
  for (int heads = 1; heads <= max_heads; ++heads) {
    include(kQkv, 3 * heads * head_dim, hidden_size);
    include(kOut, hidden_size, heads * head_dim);
  }
  for (int neurons = 16; neurons <= max_intermediate; neurons += 16) {
    include(kUp, neurons, hidden_size);
    include(kDown, hidden_size, neurons);
  }
  SharedPlan shared{};
  // The coarsest split of hidden_size is in 2.
  shared.norm_depth = round_up(ceil_div(hidden_size, 2), kTileDepth);
  shared.weight_capacity = round_up(weights, 1024);
  shared.weights[0] = round_up(activations, 1024);
  for (int buffers = 2; buffers >= 1; --buffers) {
    shared.weights[1] = shared.weights[0] + (buffers - 1) * shared.weight_capacity;
    shared.norm[0] = shared.weights[1] + shared.weight_capacity;
    shared.norm[1] = shared.norm[0] + 2 * shared.norm_depth * 2;
    shared.tables = shared.norm[1] + 2 * shared.norm_depth * 2;
    shared.total = shared.tables + round_up(table_bytes, 16);
    if (shared.total <= limit) break;
  }
  return shared;
}

}  // namespace dynabert::encoder
