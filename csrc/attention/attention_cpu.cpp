#include <ATen/Parallel.h>

#include <algorithm>

#include "attention/attention.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/prepared.h"
#include "cpu/work.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "attention";

// Few tokens: threads split the projections by outputs and the softmax core by heads.
void run_shared(const KernelTable& table, const AttentionArgs& args) {
  const AttentionPanels& panels = *args.panels;
  const std::int64_t tokens = args.num_tokens, c16 = round_up(panels.hidden_size, kLanes);
  ScratchFrame frame;
  void* context = frame.take(tokens * args.heads * panels.head_dim * sizeof(float));
  auto* sums = static_cast<float*>(frame.take(tokens * c16 * sizeof(float)));
  at::parallel_for(0, args.heads * 3 * ceil_div(panels.head_dim, kLanes), 1,
                   [&](std::int64_t first, std::int64_t last) {
                     table.attention_qkv(args, 0, tokens, first, last);
                   });
  at::parallel_for(0, args.heads, 1, [&](std::int64_t first, std::int64_t last) {
    table.attention_context_shared(args, first, last, context);
  });
  at::parallel_for(0, c16 / kLanes, 1, [&](std::int64_t first, std::int64_t last) {
    table.attention_out_shared(args, first, last, context, sums);
  });
  at::parallel_for(0, tokens, 8, [&](std::int64_t first, std::int64_t last) {
    table.attention_norm(args, first, last, sums);
  });
}

}  // namespace

std::int64_t qkv_bytes(const AttentionPanels& panels, std::int64_t heads, std::int64_t tokens) {
  const std::int64_t element = core_of(panels.compute) == Compute::kBFloat16 ? 2 : 4;
  return heads * 3 * tokens * panels.head_dim * element;
}

void run_attention(const AttentionArgs& args, const std::vector<TokenBlock>& blocks) {
  const KernelTable& table = active_table();
  if (blocks.empty()) return run_shared(table, args);
  const auto for_blocks = [&](const auto& function) {
    at::parallel_for(0, static_cast<std::int64_t>(blocks.size()), 1,
                     [&](std::int64_t first, std::int64_t last) {
                       for (std::int64_t i = first; i < last; ++i) {
                         AttentionArgs block = args;
                         block.heads = blocks[i].width;
                         function(block, blocks[i]);
                       }
                     });
  };
  const std::int64_t head_panels = 3 * ceil_div(args.panels->head_dim, kLanes);
  for_blocks([&](const AttentionArgs& of_block, const TokenBlock& block) {
    table.attention_qkv(of_block, block.first, block.last, 0, block.width * head_panels);
  });
  // Keys and values of a whole sequence are needed from here on.
  for_blocks([&](const AttentionArgs& of_block, const TokenBlock& block) {
    table.attention_rows(of_block, block.first, block.last);
  });
}

at::Tensor attention_cpu(const at::Tensor& hidden, const at::Tensor& qkv_weight,
                         const at::Tensor& qkv_bias, const at::Tensor& out_weight,
                         const at::Tensor& out_bias, const at::Tensor& norm_weight,
                         const at::Tensor& norm_bias, double norm_eps, std::int64_t num_heads,
                         const std::optional<at::Tensor>& num_heads_each,
                         const at::Tensor& cu_seqlens, std::int64_t /*max_seqlen*/,
                         double dropout_p, double attention_dropout_p,
                         std::optional<std::int64_t> /*seed*/, c10::string_view compute_name) {
  check_shape(kWho, "hidden", hidden, {-1, -1});
  const std::int64_t tokens = hidden.size(0), c = hidden.size(1);
  check_shape(kWho, "qkv_weight", qkv_weight, {-1, 3, -1, c});
  const std::int64_t limit = qkv_weight.size(0), dim = qkv_weight.size(2);
  check_shape(kWho, "qkv_bias", qkv_bias, {limit, 3, dim});
  check_shape(kWho, "out_weight", out_weight, {limit, dim, c});
  check_shape(kWho, "out_bias", out_bias, {c});
  check_shape(kWho, "norm_weight", norm_weight, {c});
  check_shape(kWho, "norm_bias", norm_bias, {c});
  DYNABERT_CHECK_VALUE(dim % 8 == 0, kWho, "head_dim", dim, "a multiple of 8",
                       "Other sizes run on the reference backend");
  DYNABERT_CHECK_VALUE(dropout_p == 0 && attention_dropout_p == 0, kWho, "dropout_p",
                       std::max(dropout_p, attention_dropout_p), "0",
                       "Dropout runs on the reference backend");
  check_offsets(kWho, cu_seqlens, tokens);
  const std::int64_t batch_size = cu_seqlens.numel() - 1;
  const std::int32_t* widths = nullptr;
  if (num_heads_each.has_value()) {
    check_widths(kWho, "num_heads", *num_heads_each, batch_size, limit);
    widths = num_heads_each->const_data_ptr<std::int32_t>();
  } else {
    check_width(kWho, "num_heads", num_heads, limit);
  }
  const at::Tensor rows = hidden.contiguous();
  at::Tensor output = at::empty(rows.sizes(), rows.options());
  if (tokens == 0) return output;

  const Compute compute = parse_compute(kWho, std::string(compute_name));
  const auto prepared = prepared_attention(
      {qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias}, norm_eps, compute);
  const std::int64_t heads =
      widths == nullptr ? num_heads : *std::max_element(widths, widths + batch_size);
  ScratchFrame frame;
  const auto* offsets = cu_seqlens.const_data_ptr<std::int32_t>();
  const AttentionArgs args{
      &prepared->panels,
      {element_of(kWho, rows), rows.const_data_ptr(), output.mutable_data_ptr()},
      heads,
      tokens,
      offsets,
      batch_size,
      frame.take(qkv_bytes(prepared->panels, heads, tokens)),
      {}};
  run_attention(args, widths == nullptr && shares_weights(tokens)
                          ? std::vector<TokenBlock>{}
                          : token_blocks(tokens, num_heads, widths, offsets, batch_size));
  return output;
}

}  // namespace dynabert
