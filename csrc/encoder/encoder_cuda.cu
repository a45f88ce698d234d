// The persistent encoder: one cooperative grid goes through all phases of all kept layers.
//
//   phase        reads                          writes                          LayerNorm
//   qkv          sums of the last down phase    queries, keys, values; hidden   on load
//   attention    queries, keys, values          context
//   out          context, hidden                sums + statistics
//   up           sums of out                    gelu(...); middle               on load
//   down         gelu(...), middle              sums + statistics
//
// With a grid barrier after each. Products that precede a LayerNorm write the sums with the
// residual and, per slice of columns, mean and squared deviations of each row; whoever loads such
// rows normalises them, and the blocks of slice 0 store the result as the next residual.
//
// A block is one warpgroup that multiplies (and streams the weights, one product ahead, across the
// barriers) and two that load activations, run attention and finish the sums of a cluster.

#include <algorithm>
#include <atomic>

#include "../cuda/grid_barrier.cuh"
#include "../cuda/launch.cuh"
#include "encoder_attention.cuh"
#include "encoder_cuda.h"
#include "encoder_parameters.cuh"
#include "encoder_products.cuh"
#include "encoder_schedule.h"

namespace dynabert {
namespace encoder {
namespace {

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1) encoder_kernel(const Parameters p) {
  DYNABERT_SHARED_MEMORY(shared);
  Step* steps = reinterpret_cast<Step*>(shared + p.shared.tables);
  const int kept = *p.call.num_kept;
  int& num_tiles = *reinterpret_cast<int*>(steps + 4 * kept);
  QueryTile* tiles = reinterpret_cast<QueryTile*>(&num_tiles + 1);

  for (int index = threadIdx.x; index < 4 * kept; index += kThreads) {
    Step& step = steps[index];
    step.args = product_args(p, kHeadDim, index);
    step.plan = plan_product(step.args.product, p.tokens, step.args.n, step.args.k, gridDim.x);
    step.task = block_task(step.plan, blockIdx.x, step.args.k);
  }
  if (threadIdx.x == kThreads - 1) {
    const int rows = 16 * query_groups(p.tokens);
    int count = 0;
    int begin = p.call.cu_seqlens[0];
    for (int sequence = 0; sequence < p.sequences; ++sequence) {
      const int end = p.call.cu_seqlens[sequence + 1];
      for (int row = begin; row < end; row += rows) {
        tiles[count++] = {static_cast<std::uint16_t>(row), static_cast<std::uint16_t>(begin),
                          static_cast<std::uint16_t>(end)};
      }
      begin = end;
    }
    num_tiles = count;
  }
  __syncthreads();

  const std::uint32_t tile = shared_address(shared);
  const int blocks = gridDim.x;
  const bool multiplies = threadIdx.x < kMmaThreads;
  const bool two_buffers = p.shared.weights[0] != p.shared.weights[1];
  // The buffers alternate.
  auto buffer_of = [&](int index) { return shared_address(shared + p.shared.weights[index & 1]); };
  auto norm_of = [&](int index) { return shared_address(shared + p.shared.norm[index & 1]); };
  auto prefetch = [&](int index) {
    if (index < 4 * kept) {
      prefetch_weights(steps[index], buffer_of(index), norm_of(index), p.shared.norm_depth);
    }
  };

  // 168 registers a thread at launch; accumulators need fewer, loads in flight more.
  if (multiplies) {
    give_up_registers<104>();
    prefetch(0);
    for (int index = 0; index < 4 * kept; ++index) {
      const ProductArgs& a = steps[index].args;
      const ProductPlan& plan = steps[index].plan;
      const BlockTask& task = steps[index].task;
      copy_async_wait<0>();
      fence_async_proxy();
      named_barrier_sync(kMmaMeet, kMmaThreads);
      named_barrier_arrive(kStaged, kThreads);
      // The other buffer was read by the product before this one, which is over.
      if (two_buffers) prefetch(index + 1);
      for (int round = 0; round < plan.rounds(); ++round) {
        if (round > 0) {
          cluster_arrive();
          cluster_wait();
        }
        if (task.active && task.depth > 0 && task.team + round * plan.teams < plan.row_tiles) {
          if (ends_in_norm(a.product)) {
            multiply_columns<true>(plan.columns, task.depth, plan.part_depth, tile,
                                   buffer_of(index));
          } else {
            multiply_columns<false>(plan.columns, task.depth, plan.part_depth, tile,
                                    buffer_of(index));
          }
        }
        if (!two_buffers && round == plan.rounds() - 1) {
          named_barrier_sync(kMmaMeet, kMmaThreads);
          prefetch(index + 1);
        }
        cluster_arrive();
        cluster_wait();
      }
    }
  } else {
    take_registers<200>();
    const bool speaks = threadIdx.x == kMmaThreads;
    GridBarrier barrier;
    auto finish_phase = [&] {
      named_barrier_sync(kLoadersMeet, kLoaders);
      if (speaks) barrier.arrive(p.workspace.barrier, blocks);
    };
    auto begin_phase = [&] {
      if (speaks) barrier.wait(p.workspace.barrier);
      named_barrier_sync(kLoadersMeet, kLoaders);
    };
    for (int index = 0; index < 4 * kept; ++index) {
      const ProductArgs& a = steps[index].args;
      const ProductPlan& plan = steps[index].plan;
      const BlockTask& task = steps[index].task;
      // The bias does not depend on the phase before and is asked for while that ends.
      const int loader = threadIdx.x - kMmaThreads;
      uint2 bias = make_uint2(0, 0);
      const int lane_column = loader % 32 * 4;
      const int column = task.slice * plan.columns + lane_column;
      if (task.active && lane_column < plan.columns && column < a.n) bias = load_bias(a, column);
      if (index > 0 && speaks) barrier.wait(p.workspace.barrier);
      named_barrier_sync(kStaged, kThreads);
      const uint4* shared_norm = reinterpret_cast<const uint4*>(shared + p.shared.norm[index & 1]);
      for (int round = 0; round < plan.rounds(); ++round) {
        if (round > 0) {
          // The other blocks have read this one's sums before activations overwrite them.
          cluster_arrive();
          cluster_wait();
        }
        const int row_tile = task.team + round * plan.teams;
        if (task.active && row_tile < plan.row_tiles) {
          const int row_begin = row_tile * kTileRows;
          load_activations(a, task, row_begin, p.tokens, p.norm_columns, p.call.norm_eps, tile,
                           shared_norm, p.shared.norm_depth);
          if (plan.split == 2) {
            finish_rows<2>(a, plan, task, row_begin, p.tokens, bias, tile);
          } else if (plan.split == 4) {
            finish_rows<4>(a, plan, task, row_begin, p.tokens, bias, tile);
          } else {
            finish_rows<8>(a, plan, task, row_begin, p.tokens, bias, tile);
          }
        } else {
          cluster_arrive();
          cluster_wait();
        }
      }
      finish_phase();
      if (a.product == kQkv) {
        begin_phase();
        attend<kHeadDim>(p, a.n / (3 * kHeadDim), tiles, num_tiles, shared);
        finish_phase();
      }
    }
    if (kept > 0) begin_phase();

    // The last LayerNorm: a row per warp, a share of the row's statistics per lane.
    const int warp = threadIdx.x / 32 - kMmaThreads / 32, lane = threadIdx.x % 32;
    for (int row = warp * blocks + blockIdx.x; row < p.tokens; row += kLoaderWarps * blocks) {
      const std::size_t offset = static_cast<std::size_t>(row) * p.hidden_size;
      uint4* output = reinterpret_cast<uint4*>(static_cast<bf16*>(p.call.output) + offset);
      if (kept == 0) {
        const uint4* input =
            reinterpret_cast<const uint4*>(static_cast<const bf16*>(p.call.hidden) + offset);
        for (int i = lane; i < p.hidden_size / 8; i += 32) output[i] = input[i];
        continue;
      }
      const EncoderLayer& last = p.call.weights[p.call.layer_list[kept - 1]];
      const float2 statistics = merge_statistics(
          read_statistics(p.workspace.ffn_statistics + row * kNormSlices, lane % 8), lane % 8,
          p.norm_columns, p.hidden_size, p.call.norm_eps);
      const uint4* input = reinterpret_cast<const uint4*>(p.workspace.ffn_sums + offset);
      const uint4* weight = static_cast<const uint4*>(last.ffn_norm_weight);
      const uint4* bias = static_cast<const uint4*>(last.ffn_norm_bias);
      for (int i = lane; i < p.hidden_size / 8; i += 32) {
        output[i] = normalise_eight(load_coherent(input + i), statistics, weight[i], bias[i]);
      }
    }
  }
}

std::size_t place_workspace(const EncoderShape& shape, void* base, Workspace* workspace) {
  std::size_t used = 0;
  auto take = [&](std::size_t bytes) {
    char* place = static_cast<char*>(base) + used;
    used += (bytes + 255) / 256 * 256;
    return static_cast<void*>(place);
  };
  const std::size_t rows = static_cast<std::size_t>(shape.tokens);
  const std::size_t hidden_bytes = rows * shape.hidden_size * sizeof(bf16);
  const std::size_t head_bytes = rows * shape.max_heads * shape.head_dim * sizeof(bf16);
  workspace->barrier = static_cast<unsigned long long*>(take(sizeof(unsigned long long)));
  workspace->attention_statistics = static_cast<float2*>(take(rows * kNormSlices * sizeof(float2)));
  workspace->ffn_statistics = static_cast<float2*>(take(rows * kNormSlices * sizeof(float2)));
  workspace->attention_sums = static_cast<bf16*>(take(hidden_bytes));
  workspace->ffn_sums = static_cast<bf16*>(take(hidden_bytes));
  workspace->hidden = static_cast<bf16*>(take(hidden_bytes));
  workspace->middle = static_cast<bf16*>(take(hidden_bytes));
  workspace->qkv = static_cast<bf16*>(take(3 * head_bytes));
  workspace->context = static_cast<bf16*>(take(head_bytes));
  workspace->activation =
      static_cast<bf16*>(take(rows * round_up(shape.max_intermediate, 16) * sizeof(bf16)));
  return used;
}

using Kernel = void (*)(Parameters);

// Heads of 128 would not fit: queries, keys and sums of a warp exceed the registers of a thread.
Kernel kernel_for(int head_dim) {
  switch (head_dim) {
    case 32:
      return encoder_kernel<32>;
    case 64:
      return encoder_kernel<64>;
  }
  return nullptr;
}

int table_bytes(const EncoderShape& shape) {
  // A tile of query rows ends at each sequence's end and after every 16 rows.
  const int tiles = shape.tokens / 16 + shape.sequences;
  return 4 * shape.layers * static_cast<int>(sizeof(Step)) + static_cast<int>(sizeof(int)) +
         tiles * static_cast<int>(sizeof(QueryTile));
}

struct LaunchPlan {
  Kernel kernel;
  SharedPlan shared;
  int blocks;
};

LaunchShape launch_shape(int blocks, int shared_bytes) {
  return {.grid = dim3(blocks),
          .block = dim3(kThreads),
          .shared_bytes = static_cast<std::size_t>(shared_bytes),
          .cluster = kClusterSize,
          .cooperative = true};
}

// Clusters that the device holds at once, at most kMaxClusters. A cluster lies within one group of
// multiprocessors, and groups differ in size: 132 of them hold 15 or 16. Asked for once per device.
int resident_clusters(Kernel kernel, int device, int head_dim, int shared_limit) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][2] = {};
  std::atomic<int>* entry = device < kDevices ? &known[device][head_dim / 64] : nullptr;
  int clusters = entry != nullptr ? entry->load(std::memory_order_relaxed) : 0;
  if (clusters > 0) return clusters;
  LaunchShape shape = launch_shape(kMaxClusters * kClusterSize, shared_limit);
  shape.cooperative = false;
  if (max_active_clusters(&clusters, kernel, shape) != cudaSuccess) return 0;
  clusters = std::min(clusters, kMaxClusters);
  if (entry != nullptr) entry->store(clusters, std::memory_order_relaxed);
  return clusters;
}

// Fills `plan`; returns why the shape cannot run on the current device, or null.
const char* plan_launch(const EncoderShape& shape, LaunchPlan* plan) {
  if (shape.tokens < 1 || shape.tokens > kMaxTokens) return "tokens are not from 1 to 512";
  if (shape.sequences < 1 || shape.sequences > shape.tokens) {
    return "sequences are not from 1 to the number of tokens";
  }
  if (shape.layers < 0 || shape.layers > kMaxLayers) return "layers are not from 0 to 48";
  if (shape.hidden_size < 128 || shape.hidden_size > kMaxHiddenSize || shape.hidden_size % 128) {
    return "hidden_size is no multiple of 128 up to 1024";
  }
  plan->kernel = kernel_for(shape.head_dim);
  if (plan->kernel == nullptr) return "head_dim is not 32 or 64";
  if (shape.max_heads < 1 || shape.max_heads * shape.head_dim > kMaxHiddenSize) {
    return "heads are not from 1 to 1024 / head_dim";
  }
  if (shape.max_intermediate < 1 || shape.max_intermediate > kMaxIntermediate) {
    return "intermediate_size is not from 1 to 4096";
  }
  int device = 0, major = 0, limit = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return "no device answers";
  }
  if (major != 9) return "the device is not compute capability 9.0";
  const int clusters = resident_clusters(plan->kernel, device, shape.head_dim, limit);
  if (clusters < kMaxClusters / 2) return "the device holds fewer than 8 clusters of 8 blocks";
  plan->blocks = clusters * kClusterSize;
  plan->shared =
      plan_shared(shape.tokens, shape.hidden_size, shape.head_dim, shape.max_heads,
                  round_up(shape.max_intermediate, 16), plan->blocks, table_bytes(shape), limit);
  if (plan->shared.total > limit) return "a slice of the weights exceeds shared memory";
  return nullptr;
}

}  // namespace
}  // namespace encoder

const char* encoder_why_not(const EncoderShape& shape) {
  encoder::LaunchPlan plan{};
  return encoder::plan_launch(shape, &plan);
}

std::size_t encoder_workspace_bytes(const EncoderShape& shape) {
  encoder::Workspace workspace{};
  return encoder::place_workspace(shape, nullptr, &workspace);
}

cudaError_t encoder_forward(const EncoderShape& shape, const EncoderCall& call,
                            cudaStream_t stream) {
  encoder::LaunchPlan plan{};
  if (encoder::plan_launch(shape, &plan) != nullptr) return cudaErrorNotSupported;
  encoder::Parameters parameters{};
  parameters.call = call;
  parameters.shared = plan.shared;
  parameters.tokens = shape.tokens;
  parameters.sequences = shape.sequences;
  parameters.hidden_size = shape.hidden_size;
  parameters.max_heads = shape.max_heads;
  parameters.max_intermediate = shape.max_intermediate;
  parameters.norm_columns =
      encoder::plan_product(encoder::kOut, shape.tokens, shape.hidden_size, 64, plan.blocks)
          .columns;
  encoder::place_workspace(shape, call.workspace, &parameters.workspace);

  return launch_kernel(plan.kernel, encoder::launch_shape(plan.blocks, plan.shared.total), stream,
                       parameters);
}

}  // namespace dynabert
