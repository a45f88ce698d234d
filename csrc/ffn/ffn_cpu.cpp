#include <ATen/Parallel.h>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/prepared.h"
#include "cpu/work.h"
#include "ffn/ffn.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "ffn";

// Few tokens: threads split the neurons, then the outputs, then the rows. The intermediate of all
// groups exists here, a few dozen rows of it.
void run_shared(const KernelTable& table, const FfnArgs& args, std::int64_t tokens) {
  const FfnPanels& panels = *args.panels;
  const std::int64_t groups = ceil_div(args.neurons, kNeuronGroup);
  const std::int64_t c16 = round_up(panels.hidden_size, kLanes);
  ScratchFrame frame;
  void* inner = frame.take(groups * tokens * kNeuronGroup * sizeof(float));
  auto* sums = static_cast<float*>(frame.take(tokens * c16 * sizeof(float)));
  at::parallel_for(0, ceil_div(args.neurons, kLanes), 1,
                   [&](std::int64_t first, std::int64_t last) {
                     table.ffn_up_shared(args, tokens, first, last, inner);
                   });
  at::parallel_for(0, c16 / kLanes, 1, [&](std::int64_t first, std::int64_t last) {
    table.ffn_down_shared(args, tokens, first, last, inner, sums);
  });
  at::parallel_for(0, tokens, 8, [&](std::int64_t first, std::int64_t last) {
    table.ffn_norm(args, first, last, sums);
  });
}

}  // namespace

void run_ffn(const FfnArgs& args, std::int64_t tokens, const std::vector<TokenBlock>& blocks) {
  const KernelTable& table = active_table();
  if (blocks.empty()) return run_shared(table, args, tokens);
  at::parallel_for(0, static_cast<std::int64_t>(blocks.size()), 1,
                   [&](std::int64_t first, std::int64_t last) {
                     for (std::int64_t i = first; i < last; ++i) {
                       FfnArgs block = args;
                       block.neurons = blocks[i].width;
                       table.ffn(block, blocks[i].first, blocks[i].last);
                     }
                   });
}

at::Tensor ffn_cpu(const at::Tensor& hidden, const at::Tensor& up_weight, const at::Tensor& up_bias,
                   const at::Tensor& down_weight, const at::Tensor& down_bias,
                   const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                   c10::string_view activation, std::int64_t intermediate_size,
                   const std::optional<at::Tensor>& intermediate_sizes,
                   const std::optional<at::Tensor>& cu_seqlens, double dropout_p,
                   std::optional<std::int64_t> /*seed*/, c10::string_view compute) {
  check_shape(kWho, "hidden", hidden, {-1, -1});
  check_shape(kWho, "up_weight", up_weight, {-1, hidden.size(1)});
  const std::int64_t tokens = hidden.size(0), limit = up_weight.size(0), c = hidden.size(1);
  check_shape(kWho, "up_bias", up_bias, {limit});
  check_shape(kWho, "down_weight", down_weight, {limit, c});
  check_shape(kWho, "down_bias", down_bias, {c});
  check_shape(kWho, "norm_weight", norm_weight, {c});
  check_shape(kWho, "norm_bias", norm_bias, {c});
  DYNABERT_CHECK_VALUE(dropout_p == 0, kWho, "dropout_p", dropout_p, "0",
                       "Dropout runs on the reference backend");
  const std::int32_t* offsets = nullptr;
  const std::int32_t* widths = nullptr;
  std::int64_t batch_size = 0;
  if (intermediate_sizes.has_value()) {
    DYNABERT_CHECK_VALUE(cu_seqlens.has_value(), kWho, "cu_seqlens", "None", "ragged offsets",
                         "One width per sequence needs them");
    check_offsets(kWho, *cu_seqlens, tokens);
    batch_size = cu_seqlens->numel() - 1;
    check_widths(kWho, "intermediate_size", *intermediate_sizes, batch_size, limit);
    offsets = cu_seqlens->const_data_ptr<std::int32_t>();
    widths = intermediate_sizes->const_data_ptr<std::int32_t>();
  } else {
    check_width(kWho, "intermediate_size", intermediate_size, limit);
  }
  const at::Tensor rows = hidden.contiguous();
  at::Tensor output = at::empty(rows.sizes(), rows.options());
  if (tokens == 0) return output;

  const auto prepared = prepared_ffn(
      {up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias}, norm_eps,
      parse_activation(kWho, std::string(activation)), parse_compute(kWho, std::string(compute)));
  const FfnArgs args{&prepared->panels,
                     {element_of(kWho, rows), rows.const_data_ptr(), output.mutable_data_ptr()},
                     intermediate_size,
                     {}};
  run_ffn(args, tokens,
          widths == nullptr && shares_weights(tokens)
              ? std::vector<TokenBlock>{}
              : token_blocks(tokens, intermediate_size, widths, offsets, batch_size));
  return output;
}

}  // namespace dynabert
