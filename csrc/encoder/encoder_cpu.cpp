#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/prepared.h"
#include "cpu/work.h"
#include "encoder/encoder.h"
#include "ffn/ffn.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "encoder";

struct Layer {
  std::shared_ptr<const PreparedAttention> attention;
  std::shared_ptr<const PreparedFfn> ffn;
  std::int64_t heads, neurons;
};

WeightTensors weights_of(at::TensorList all, std::size_t layer) {
  WeightTensors weights;
  std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(layer * weights.size()), weights.size(),
              weights.begin());
  return weights;
}

void check_attention(const WeightTensors& weights, std::int64_t hidden_size, std::int64_t heads) {
  check_shape(kWho, "qkv_weight", weights[0], {-1, 3, -1, hidden_size});
  const std::int64_t limit = weights[0].size(0), dim = weights[0].size(2);
  check_shape(kWho, "qkv_bias", weights[1], {limit, 3, dim});
  check_shape(kWho, "out_weight", weights[2], {limit, dim, hidden_size});
  for (std::size_t i = 3; i < 6; ++i) check_shape(kWho, "bias and norm", weights[i], {hidden_size});
  DYNABERT_CHECK_VALUE(dim % 8 == 0, kWho, "head_dim", dim, "a multiple of 8",
                       "Other sizes run on the reference backend");
  check_width(kWho, "num_heads", heads, limit);
}

void check_ffn(const WeightTensors& weights, std::int64_t hidden_size, std::int64_t neurons) {
  check_shape(kWho, "up_weight", weights[0], {-1, hidden_size});
  const std::int64_t limit = weights[0].size(0);
  check_shape(kWho, "up_bias", weights[1], {limit});
  check_shape(kWho, "down_weight", weights[2], {limit, hidden_size});
  for (std::size_t i = 3; i < 6; ++i) check_shape(kWho, "bias and norm", weights[i], {hidden_size});
  check_width(kWho, "intermediate_size", neurons, limit);
}

}  // namespace

at::Tensor encoder_cpu(const at::Tensor& hidden, at::TensorList attention_weights,
                       at::TensorList ffn_weights, at::ArrayRef<double> norm_eps,
                       c10::string_view activation_name, at::IntArrayRef num_heads,
                       at::IntArrayRef intermediate_sizes, const at::Tensor& cu_seqlens,
                       c10::string_view compute_name) {
  check_shape(kWho, "hidden", hidden, {-1, -1});
  const std::int64_t tokens = hidden.size(0), hidden_size = hidden.size(1);
  check_offsets(kWho, cu_seqlens, tokens);
  const std::size_t count = num_heads.size();
  DYNABERT_CHECK_VALUE(intermediate_sizes.size() == count && norm_eps.size() == 2 * count &&
                           attention_weights.size() == 6 * count && ffn_weights.size() == 6 * count,
                       kWho, "layers", attention_weights.size() / 6, count,
                       "Give six tensors and two epsilons for each layer");
  const Compute compute = parse_compute(kWho, std::string(compute_name));
  const Activation activation = parse_activation(kWho, std::string(activation_name));
  at::Tensor output = hidden.contiguous().clone();
  if (tokens == 0) return output;

  // The layers work in place: a row is read for the last time before it is written.
  const Rows rows{element_of(kWho, output), output.const_data_ptr(), output.mutable_data_ptr()};
  const auto* offsets = cu_seqlens.const_data_ptr<std::int32_t>();
  const std::int64_t batch_size = cu_seqlens.numel() - 1;
  std::vector<Layer> layers;
  std::int64_t room = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const WeightTensors attention = weights_of(attention_weights, i);
    const WeightTensors ffn = weights_of(ffn_weights, i);
    check_attention(attention, hidden_size, num_heads[i]);
    check_ffn(ffn, hidden_size, intermediate_sizes[i]);
    layers.push_back({prepared_attention(attention, norm_eps[2 * i], compute),
                      prepared_ffn(ffn, norm_eps[2 * i + 1], activation, compute), num_heads[i],
                      intermediate_sizes[i]});
    room = std::max(room, qkv_bytes(layers.back().attention->panels, num_heads[i], tokens));
  }
  ScratchFrame frame;
  // Two, taking turns: a block may be projected for the next layer while another still attends.
  void* const qkv[2] = {frame.take(room), frame.take(room)};
  const auto attention_args = [&](std::size_t i) {
    const FfnPanels& next = layers[i].ffn->panels;
    return AttentionArgs{&layers[i].attention->panels,
                         rows,
                         layers[i].heads,
                         tokens,
                         offsets,
                         batch_size,
                         qkv[i % 2],
                         {next.data, next.up_steps * kStepBytes}};
  };
  const auto ffn_args = [&](std::size_t i) {
    const AttentionPanels& next = layers[std::min(i + 1, count - 1)].attention->panels;
    return FfnArgs{
        &layers[i].ffn->panels, rows, layers[i].neurons, {next.data, next.qkv_steps * kStepBytes}};
  };

  if (shares_weights(tokens)) {
    for (std::size_t i = 0; i < count; ++i) {
      run_attention(attention_args(i), {});
      run_ffn(ffn_args(i), tokens, {});
    }
    return output;
  }
  const KernelTable& table = active_table();
  const auto blocks = token_blocks(tokens, 0, nullptr, nullptr, 0);
  for (std::size_t i = 0; i <= count; ++i) {
    at::parallel_for(
        0, static_cast<std::int64_t>(blocks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
          for (std::int64_t b = begin; b < end; ++b) {
            const std::int64_t first = blocks[b].first, last = blocks[b].last;
            if (i > 0) {
              table.attention_rows(attention_args(i - 1), first, last);
              table.ffn(ffn_args(i - 1), first, last);
            }
            if (i < count) {
              const AttentionArgs args = attention_args(i);
              table.attention_qkv(args, first, last, 0,
                                  args.heads * 3 * ceil_div(args.panels->head_dim, kLanes));
            }
          }
        });
  }
  return output;
}

}  // namespace dynabert
