// What the CPU kernels of every instruction set offer, free of torch.
//
// Letters: T tokens of the batch, C hidden_size, H heads, D head_dim, I intermediate_size, K the
// reduced dimension of a product.
//
// All three precisions share one operand format, whose unit is 4 bytes along K: one float, two
// bfloat16 or four int8. A *panel* holds the weights of 16 outputs as [steps][16] units, so that
// one 64-byte step meets one broadcast unit of a token. Panels lie in prefix order: heads or groups
// of neurons first, so a narrower call reads the beginning of one contiguous buffer.

#pragma once

#include <cstddef>
#include <cstdint>

namespace dynabert {

enum class Compute { kFloat32, kBFloat16, kInt8 };
enum class Element { kFloat32, kBFloat16 };
enum class Activation { kGelu, kGeluTanh, kRelu };

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kStepBytes = 64;
// Neurons whose down-products are summed before they join the row: the fixed blocks of the
// reduction, and the span over which int8 quantises an activation. A block's activations of one
// group stay in L2; the fewer neurons, the more time goes into adding to the sums. 384 divides the
// usual sizes at the usual widths.
constexpr std::int64_t kNeuronGroup = 384;

constexpr std::int64_t per_unit(Compute compute) {
  return compute == Compute::kFloat32 ? 1 : compute == Compute::kBFloat16 ? 2 : 4;
}
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// Vectors of 16 channels that int8 mixes with each other before it quantises a token of the
// residual stream (`spread` in dynabert_kernels/quantization.py): the largest power of two that
// divides the channels, and no more than fit the registers.
constexpr std::int64_t kMostSpread = 16;
constexpr std::int64_t spread_of(std::int64_t hidden_size) {
  std::int64_t vectors = 1;
  while (vectors < kMostSpread && hidden_size % (2 * vectors * kLanes) == 0) vectors *= 2;
  return vectors;
}

// Type of queries, keys, values and probabilities: int8 quantises only the projections.
constexpr Compute core_of(Compute compute) {
  return compute == Compute::kBFloat16 ? Compute::kBFloat16 : Compute::kFloat32;
}

// Tail of a post-norm sublayer: LayerNorm(product + bias + residual). All float32, padded to C16 =
// round_up(C, 16).
struct NormWeights {
  const float* bias;         // [C16] of the last projection
  const float* scale;        // [C16] its int8 scales; nullptr otherwise
  const float* norm_weight;  // [C16]
  const float* norm_bias;    // [C16]
  float eps;
};

// Panels that a thread will read next, to be prefetched. Any address will do: a prefetch never
// faults.
struct Upcoming {
  const std::byte* panels;
  std::int64_t panel_bytes;  // from one to the next
};

// One group: kNeuronGroup / 16 up panels of `up_steps`, then C16 / 16 down panels of
// kNeuronGroup / per_unit steps.
struct FfnPanels {
  Compute compute;
  Activation activation;
  std::int64_t hidden_size, intermediate_size;
  std::int64_t up_steps;  // ceil(C / per_unit)
  std::int64_t group_bytes;
  const std::byte* data;  // [groups][group_bytes]
  const float* up_bias;   // [round_up(I, kNeuronGroup)]
  const float* up_scale;  // the same; int8 only
  NormWeights norm;
};

// One head: query, key and value panels, each D16 / 16 of `qkv_steps`; then C16 / 16 out panels of
// D / per_unit steps.
struct AttentionPanels {
  Compute compute;
  std::int64_t hidden_size, num_heads, head_dim;
  std::int64_t qkv_steps;  // ceil(C / per_unit)
  std::int64_t head_bytes;
  const std::byte* data;   // [H][head_bytes]
  const float* qkv_bias;   // [H][3][D16]
  const float* qkv_scale;  // the same; int8 only
  NormWeights norm;
};

// Tokens in and out, rows contiguous.
struct Rows {
  Element element;
  const void* hidden;  // [T][C]
  void* output;        // [T][C]
};

struct FfnArgs {
  const FfnPanels* panels;
  Rows rows;
  std::int64_t neurons;
  Upcoming next;  // after this sublayer
};

struct AttentionArgs {
  const AttentionPanels* panels;
  Rows rows;
  std::int64_t heads;
  std::int64_t num_tokens;         // T, of the scratch below
  const std::int32_t* cu_seqlens;  // [B + 1]
  std::int64_t batch_size;
  void* qkv;      // [H][3][T][D] of core_of(compute)
  Upcoming next;  // after this sublayer
};

// Memory a thread keeps between calls. A frame takes pieces and gives them all back at its end.
class ScratchFrame {
 public:
  ScratchFrame();
  ~ScratchFrame();
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;
  // Uninitialised, aligned to 64 bytes, valid until the frame ends.
  void* take(std::size_t bytes);

 private:
  std::size_t mark_block_, mark_used_;
};

// Rows [first, last) of the batch and one width per call. The `_shared` forms split a product by
// outputs among threads instead, for batches too short to give each thread tokens of its own; their
// buffers belong to all threads of the call, and a barrier stands between the phases.
struct KernelTable {
  const char* name;

  void (*ffn)(const FfnArgs&, std::int64_t first, std::int64_t last);
  // Phase 1, panels of 16 neurons: inner[groups][T][kNeuronGroup] floats or bfloat16.
  void (*ffn_up_shared)(const FfnArgs&, std::int64_t tokens, std::int64_t first_panel,
                        std::int64_t last_panel, void* inner);
  // Phase 2, panels of 16 outputs: sums[T][C16].
  void (*ffn_down_shared)(const FfnArgs&, std::int64_t tokens, std::int64_t first_panel,
                          std::int64_t last_panel, const void* inner, float* sums);
  void (*ffn_norm)(const FfnArgs&, std::int64_t first, std::int64_t last, float* sums);

  // Phase 1: the projections of heads [first_head, last_head) for rows [first, last), to args.qkv.
  void (*attention_qkv)(const AttentionArgs&, std::int64_t first, std::int64_t last,
                        std::int64_t first_panel, std::int64_t last_panel);
  // Phase 2: softmax core, output projection and norm of rows [first, last).
  void (*attention_rows)(const AttentionArgs&, std::int64_t first, std::int64_t last);
  void (*attention_context_shared)(const AttentionArgs&, std::int64_t first_head,
                                   std::int64_t last_head, void* context);
  void (*attention_out_shared)(const AttentionArgs&, std::int64_t first_panel,
                               std::int64_t last_panel, const void* context, float* sums);
  void (*attention_norm)(const AttentionArgs&, std::int64_t first, std::int64_t last, float* sums);

  // y[i] = activation(x[i]), n values; for tests of the approximation.
  void (*activate)(Activation, const float* x, float* y, std::int64_t n);
};

}  // namespace dynabert
