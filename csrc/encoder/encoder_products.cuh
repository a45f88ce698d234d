// The matrix products of the persistent encoder: weights and activations to shared memory, the
// warpgroup product, and the sum over a cluster with its epilogue.

#pragma once

#include "../cuda/activation.cuh"
#include "../cuda/grid_barrier.cuh"
#include "../cuda/mma.cuh"
#include "../cuda/wgmma_narrow.cuh"
#include "encoder_parameters.cuh"

namespace dynabert::encoder {

// One product of one layer as all its threads see it.
struct ProductArgs {
  Product product;
  int n, k;
  int weight_rows;  // of the prefix; neurons are rounded up to 16 in n and k
  const bf16* weight;
  const bf16* bias;
  const bf16* input;               // [tokens, k]
  bool normalise;                  // the input is sums that need LayerNorm
  const float2* input_statistics;  // [tokens, kNormSlices]
  const bf16* norm_weight;
  const bf16* norm_bias;
  bf16* normalised;           // where slice 0 stores what it normalised
  const bf16* residual;       // kOut, kDown: [tokens, n]
  float2* output_statistics;  // kOut, kDown
  bf16* output;               // [tokens, n]
};

// The product `index`, four a layer, in the order of the layer list.
__device__ inline ProductArgs product_args(const Parameters& p, int head_dim, int index) {
  const int position = index / 4;
  const Product product = static_cast<Product>(index % 4);
  const EncoderLayer& layer = p.call.weights[p.call.layer_list[position]];
  const int place = p.call.one_width ? 0 : position;
  const int num_heads = min(max(p.call.num_heads[place], 1), p.max_heads);
  const int neurons = min(max(p.call.intermediate_size[place], 1), p.max_intermediate);
  const Workspace& w = p.workspace;
  const int head_columns = num_heads * head_dim;
  auto pointer = [](const void* v) { return static_cast<const bf16*>(v); };
  ProductArgs a{};
  a.product = product;
  if (product == kQkv) {
    a.n = a.weight_rows = 3 * head_columns;
    a.k = p.hidden_size;
    a.weight = pointer(layer.qkv_weight);
    a.bias = pointer(layer.qkv_bias);
    a.normalise = position > 0;
    a.input = a.normalise ? w.ffn_sums : pointer(p.call.hidden);
    if (a.normalise) {
      const EncoderLayer& previous = p.call.weights[p.call.layer_list[position - 1]];
      a.input_statistics = w.ffn_statistics;
      a.norm_weight = pointer(previous.ffn_norm_weight);
      a.norm_bias = pointer(previous.ffn_norm_bias);
      a.normalised = w.hidden;
    }
    a.output = w.qkv;
  } else if (product == kOut) {
    a.n = p.hidden_size;
    a.k = a.weight_rows = head_columns;
    a.weight = pointer(layer.out_weight);
    a.bias = pointer(layer.out_bias);
    a.input = w.context;
    a.residual = position > 0 ? w.hidden : pointer(p.call.hidden);
    a.output_statistics = w.attention_statistics;
    a.output = w.attention_sums;
  } else if (product == kUp) {
    a.n = round_up(neurons, 16);
    a.k = p.hidden_size;
    a.weight_rows = neurons;
    a.weight = pointer(layer.up_weight);
    a.bias = pointer(layer.up_bias);
    a.input = w.attention_sums;
    a.normalise = true;
    a.input_statistics = w.attention_statistics;
    a.norm_weight = pointer(layer.attention_norm_weight);
    a.norm_bias = pointer(layer.attention_norm_bias);
    a.normalised = w.middle;
    a.output = w.activation;
  } else {
    a.n = p.hidden_size;
    a.k = round_up(neurons, 16);
    a.weight_rows = neurons;
    a.weight = pointer(layer.down_weight);
    a.bias = pointer(layer.down_bias);
    a.input = w.activation;
    a.residual = w.middle;
    a.output_statistics = w.ffn_statistics;
    a.output = w.ffn_sums;
  }
  return a;
}

// Four values of the bias from `column` on, a multiple of 4; zeros past an odd number of neurons.
__device__ __forceinline__ uint2 load_bias(const ProductArgs& a, int column) {
  const int valid = a.product == kUp ? a.weight_rows - column : 4;
  if (valid >= 4) return *reinterpret_cast<const uint2*>(a.bias + column);
  const unsigned short* bias = reinterpret_cast<const unsigned short*>(a.bias + column);
  unsigned values[3] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i < valid) values[i] = bias[i];
  }
  return make_uint2(values[0] | values[1] << 16, values[2]);
}

// A product with this block's part in it. All of them lie in shared memory, made once: registers
// are short, and the divisions are many.
struct Step {
  ProductArgs args;
  ProductPlan plan;
  BlockTask task;
};

// Starts the copy of this block's slice of the weights, and of the LayerNorm parameters that its
// activations need; the 128 threads of the first warpgroup. A last block of less than 64 K values
// is filled with zeros, here and in the activations. Neurons past the prefix have zeros here, and
// what up computes for them is another neuron's, which zeros end.
__device__ __forceinline__ void prefetch_weights(const Step& step, std::uint32_t buffer,
                                                 std::uint32_t norm, int norm_depth) {
  const ProductArgs& a = step.args;
  const ProductPlan& plan = step.plan;
  const BlockTask& task = step.task;
  const int column_begin = task.slice * plan.columns;
  if (task.active && ends_in_norm(a.product)) {
    // [K, N] in blocks of 16 columns: rows of 32 bytes, 16-byte piece c of row r at
    // c ^ (r / 4) % 2.
    const int piece = threadIdx.x % 2;
    const int depth = round_up(task.depth, kTileDepth);
    for (int block = 0; block < plan.columns / 16; ++block) {
      // The last slice may be short; its missing columns are multiplied and not stored.
      if (column_begin + block * 16 >= a.n) break;
      const bf16* source = a.weight + static_cast<std::size_t>(task.depth_begin) * a.n +
                           column_begin + block * 16 + piece * 8;
      const std::uint32_t base = buffer + block * plan.part_depth * 32;
#pragma unroll 4
      for (int row = threadIdx.x / 2; row < depth; row += kMmaThreads / 2) {
        const std::uint32_t place = base + row * 32 + (piece ^ (row / 4 & 1)) * 16;
        if (task.depth_begin + row < a.weight_rows) {
          copy_async_16(place, source + static_cast<std::size_t>(row) * a.n);
        } else {
          store_shared(place, make_uint4(0, 0, 0, 0));
        }
      }
    }
  } else if (task.active) {
    // [N, K] in blocks of 64 K values: rows of 128 bytes, 16-byte piece c of row r at c ^ r % 8.
    const int piece = threadIdx.x % 8;
    for (int block = 0; block * kTileDepth < task.depth; ++block) {
      const bool inside = block * kTileDepth + piece * 8 < task.depth;
      const bf16* source = a.weight + task.depth_begin + block * kTileDepth + piece * 8;
      const std::uint32_t base = buffer + block * plan.columns * 128;
#pragma unroll 4
      for (int row = threadIdx.x / 8; row < plan.columns; row += kMmaThreads / 8) {
        const int column = min(column_begin + row, a.weight_rows - 1);
        const std::uint32_t place = base + row * 128 + (piece ^ (row & 7)) * 16;
        if (inside) {
          copy_async_16(place, source + static_cast<std::size_t>(column) * a.k);
        } else {
          store_shared(place, make_uint4(0, 0, 0, 0));
        }
      }
    }
  }
  if (a.normalise && threadIdx.x * 8 < task.depth) {
    const int depth = threadIdx.x * 8;
    copy_async_16(norm + depth * 2, a.norm_weight + task.depth_begin + depth);
    copy_async_16(norm + (norm_depth + depth) * 2, a.norm_bias + task.depth_begin + depth);
  }
  copy_async_commit();
}

// The loaders' part: a tile of 64 rows and the block's part of K, normalised if need be, in blocks
// of 64 K values as prefetch_weights() lays out [N, K]. Announces each half.
__device__ __forceinline__ void load_activations(const ProductArgs& a, const BlockTask& task,
                                                 int row_begin, int tokens, int norm_columns,
                                                 float eps, std::uint32_t shared_tile,
                                                 const uint4* shared_norm, int norm_depth) {
  constexpr int kBlocks = kMaxPartDepth / kTileDepth;
  const int loader = threadIdx.x - kMmaThreads;
  const int piece = loader % 8;
  const int row = loader / 8;  // and row + 32
  const bool has_row[2] = {row_begin + row < tokens, row_begin + row + 32 < tokens};

  SliceStatistics slices[2];
  if (a.normalise) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Rows past the end repeat the last one: all eight threads of a row take part in the merge.
      const int source = min(row_begin + row + 32 * i, tokens - 1);
      slices[i] = read_statistics(a.input_statistics + source * kNormSlices, piece);
    }
  }
  uint4 values[kBlocks][2];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int depth = block * kTileDepth + piece * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      values[block][i] = make_uint4(0, 0, 0, 0);
      if (depth < task.depth && has_row[i]) {
        values[block][i] = load_coherent(reinterpret_cast<const uint4*>(
            a.input + static_cast<std::size_t>(row_begin + row + 32 * i) * a.k + task.depth_begin +
            depth));
      }
    }
  }
  float2 statistics[2];
  if (a.normalise) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      statistics[i] = merge_statistics(slices[i], piece, norm_columns, a.k, eps);
    }
  }
  const int blocks = ceil_div(task.depth, kTileDepth);
  const int half = first_half(blocks);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if (block < blocks) {
      const int depth = block * kTileDepth + piece * 8;
      if (a.normalise && depth < task.depth) {
        const uint4 weight = shared_norm[depth / 8];
        const uint4 bias = shared_norm[(norm_depth + depth) / 8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          values[block][i] = normalise_eight(values[block][i], statistics[i], weight, bias);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        store_shared(
            shared_tile + block * kTileRows * 128 + (row + 32 * i) * 128 + (piece ^ (row & 7)) * 16,
            values[block][i]);
      }
      if (block + 1 == half || block + 1 == blocks) {
        fence_async_proxy();
        named_barrier_arrive(kHalfReady + (block + 1 != half), kThreads);
      }
    }
  }
  if (a.normalise && task.slice == 0) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int depth = block * kTileDepth + piece * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (depth < task.depth && has_row[i]) {
          *reinterpret_cast<uint4*>(a.normalised +
                                    static_cast<std::size_t>(row_begin + row + 32 * i) * a.k +
                                    task.depth_begin + depth) = values[block][i];
        }
      }
    }
  }
}

// The first warpgroup's part: multiplies the tile by the block's slice of the weights and leaves
// the sums, fp16 [64, columns], where the activations were: neighbours read them over a network
// that is slower than L2, and fp16 still has three bits more than the result.
template <int kColumns, bool kTransposed>
__device__ __forceinline__ void multiply(int depth, int part_depth, std::uint32_t tile,
                                         std::uint32_t weights) {
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 0.0f;
  std::uint64_t a = wgmma_descriptor(tile, 16, 1024);
  std::uint64_t b = kTransposed ? wgmma_descriptor_32(weights, part_depth * 32)
                                : wgmma_descriptor(weights, 16, 1024);
  constexpr int kStep = kTransposed ? 512 : 32;                   // bytes of B for 16 K values
  constexpr int kBlock = kTransposed ? 4 * 512 : kColumns * 128;  // for 64
  const int blocks = ceil_div(depth, kTileDepth);
  const int half = first_half(blocks);
  int block = 0;
  do {
    if (block == 0 || block == half) named_barrier_sync(kHalfReady + (block != 0), kThreads);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      NarrowWgmma<kColumns>::template run<kTransposed>(d, wgmma_advance(a, step * 32),
                                                       wgmma_advance(b, step * kStep), 1);
    }
    wgmma_commit();
    a = wgmma_advance(a, kTileRows * 128);
    b = wgmma_advance(b, kBlock);
  } while (++block < blocks);
  wgmma_wait<0>();
  pin_registers(d);
  // The sums overwrite activations that another warp may still be multiplying.
  named_barrier_sync(kMmaMeet, kMmaThreads);
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4;
  const std::uint32_t place = tile + (row * partial_stride(kColumns) + lane % 4 * 2) * 2;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    store_shared(place + j * 16, pack_half(d[4 * j], d[4 * j + 1]));
    store_shared(place + j * 16 + 8 * partial_stride(kColumns) * 2,
                 pack_half(d[4 * j + 2], d[4 * j + 3]));
  }
}

template <bool kTransposed>
__device__ __forceinline__ void multiply_columns(int columns, int depth, int part_depth,
                                                 std::uint32_t tile, std::uint32_t weights) {
  switch (columns) {
#define DYNABERT_COLUMNS(N) \
  case N:                   \
    return multiply<N, kTransposed>(depth, part_depth, tile, weights);
    DYNABERT_COLUMNS(16)
    DYNABERT_COLUMNS(32)
    DYNABERT_COLUMNS(48)
    DYNABERT_COLUMNS(64)
    DYNABERT_COLUMNS(80)
    DYNABERT_COLUMNS(96)
    DYNABERT_COLUMNS(112)
    DYNABERT_COLUMNS(128)
  }
  if constexpr (!kTransposed) {
    switch (columns) {
      DYNABERT_COLUMNS(8)
      DYNABERT_COLUMNS(24)
      DYNABERT_COLUMNS(40)
      DYNABERT_COLUMNS(56)
      DYNABERT_COLUMNS(72)
      DYNABERT_COLUMNS(88)
      DYNABERT_COLUMNS(104)
      DYNABERT_COLUMNS(120)
    }
  }
#undef DYNABERT_COLUMNS
  __trap();
}

// The loaders' last part: of a finished tile, this block's share of the rows, a row per warp and
// four columns per lane. Adds the parts in their order; bias, then GELU or residual and statistics.
// Meets the cluster once, when the parts are there.
template <int kSplit>
__device__ __forceinline__ void finish_rows(const ProductArgs& a, const ProductPlan& plan,
                                            const BlockTask& task, int row_begin, int tokens,
                                            uint2 bias, std::uint32_t tile) {
  constexpr int kShare = kTileRows / kSplit;    // rows of this block
  constexpr int kRows = kShare / kLoaderWarps;  // of a warp: every eighth
  static_assert(kRows * kSplit == 8, "a lane has 8 remote loads in flight at every split");
  const int warp = threadIdx.x / 32 - kMmaThreads / 32;
  const int lane = threadIdx.x % 32;
  const int column = task.slice * plan.columns + lane * 4;
  const bool has_columns = lane * 4 < plan.columns && column < a.n;
  const int first_row = row_begin + task.part * kShare + warp;

  // The residual is asked for before the cluster is waited for.
  uint2 residual[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kLoaderWarps;
    if (a.residual != nullptr && has_columns && row < tokens) {
      residual[i] = __ldcg(reinterpret_cast<const uint2*>(
          a.residual + static_cast<std::size_t>(row) * a.n + column));
    }
  }
  cluster_arrive();
  cluster_wait();

  const int stride = partial_stride(plan.columns) * 2;
  const std::uint32_t place =
      tile + (task.part * kShare + warp) * stride + (has_columns ? lane * 8 : 0);
  const int first_rank = static_cast<int>(cluster_rank()) - task.part;
  uint2 parts[kRows][kSplit];
#pragma unroll
  for (int part = 0; part < kSplit; ++part) {
    const std::uint32_t remote = cluster_address(place, first_rank + part);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      parts[i][part] = cluster_load(remote + i * kLoaderWarps * stride);
    }
  }
  float4 sums[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int part = 0; part < kSplit; ++part) {
      // Blocks without a part left nothing there.
      if (part < plan.parts) {
        const float2 low = unpack_half(parts[i][part].x), high = unpack_half(parts[i][part].y);
        sums[i].x += low.x;
        sums[i].y += low.y;
        sums[i].z += high.x;
        sums[i].w += high.y;
      }
    }
  }

  const float2 bias_low = unpack_bf16(bias.x), bias_high = unpack_bf16(bias.y);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kLoaderWarps;
    if (row >= tokens) continue;  // the whole warp
    float x[4] = {sums[i].x + bias_low.x, sums[i].y + bias_low.y, sums[i].z + bias_high.x,
                  sums[i].w + bias_high.y};
    if (a.product == kUp) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = gelu_erf(x[j]);
    } else if (a.residual != nullptr) {
      const float2 low = unpack_bf16(residual[i].x), high = unpack_bf16(residual[i].y);
      x[0] += low.x;
      x[1] += low.y;
      x[2] += high.x;
      x[3] += high.y;
    }
    const uint2 packed = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    if (has_columns) {
      *reinterpret_cast<uint2*>(a.output + static_cast<std::size_t>(row) * a.n + column) = packed;
    }
    if (a.residual != nullptr) {
      // Statistics of what was stored, not of what was rounded away.
      const float2 low = unpack_bf16(packed.x), high = unpack_bf16(packed.y);
      float mean = has_columns ? (low.x + low.y) + (high.x + high.y) : 0.0f;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) mean += __shfl_xor_sync(kAllLanes, mean, step);
      mean /= static_cast<float>(min(plan.columns, a.n - task.slice * plan.columns));
      const float dx = low.x - mean, dy = low.y - mean, dz = high.x - mean, dw = high.y - mean;
      float squares = has_columns ? (dx * dx + dy * dy) + (dz * dz + dw * dw) : 0.0f;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
      if (lane == 0) {
        a.output_statistics[row * kNormSlices + task.slice] = make_float2(mean, squares);
      }
    }
  }
}

}  // namespace dynabert::encoder
