#include "attention/attention_training.h"
#include "checks.h"
#include "cpu/training.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "attention";

// The checked arguments both directions share.
struct Call {
  at::Tensor hidden, qkv_weight, out_weight;
  std::int64_t tokens, size, c16, dim, batch_size;
  std::int64_t limit, widest;  // heads: of the weights, and of the widest prefix
  std::int64_t heads;          // of the tensors kept for the gradient
  Compute compute;
  const std::int32_t *offsets, *widths;
  std::vector<TokenBlock> blocks;

  Call(const at::Tensor& hidden_, const at::Tensor& qkv, const at::Tensor& qkv_bias,
       const at::Tensor& out, const at::Tensor& out_bias, const at::Tensor& norm_weight,
       const at::Tensor& norm_bias, std::int64_t num_heads, const std::optional<at::Tensor>& each,
       const at::Tensor& cu_seqlens, c10::string_view compute_name) {
    check_shape(kWho, "hidden", hidden_, {-1, -1});
    tokens = hidden_.size(0);
    size = hidden_.size(1);
    c16 = round_up(size, kLanes);
    check_shape(kWho, "qkv_weight", qkv, {-1, 3, -1, size});
    limit = qkv.size(0);
    dim = qkv.size(2);
    check_shape(kWho, "qkv_bias", qkv_bias, {limit, 3, dim});
    check_shape(kWho, "out_weight", out, {limit, dim, size});
    check_shape(kWho, "out_bias", out_bias, {size});
    check_shape(kWho, "norm_weight", norm_weight, {size});
    check_shape(kWho, "norm_bias", norm_bias, {size});
    DYNABERT_CHECK_VALUE(dim % 8 == 0, kWho, "head_dim", dim, "a multiple of 8",
                         "Other sizes run on the reference backend");
    check_offsets(kWho, cu_seqlens, tokens);
    batch_size = cu_seqlens.numel() - 1;
    offsets = cu_seqlens.const_data_ptr<std::int32_t>();
    widths = nullptr;
    heads = num_heads;
    if (each.has_value()) {
      check_widths(kWho, "num_heads", *each, batch_size, limit);
      widths = each->const_data_ptr<std::int32_t>();
    } else {
      check_width(kWho, "num_heads", num_heads, limit);
    }
    compute = parse_training_compute(kWho, compute_name);
    hidden = hidden_.contiguous();
    qkv_weight = qkv.contiguous();
    out_weight = out.contiguous();
    blocks = token_blocks(tokens, num_heads, widths, offsets, batch_size);
    widest = 0;
    for (const TokenBlock& block : blocks) widest = std::max(widest, block.width);
  }

  Element element() const {
    return compute == Compute::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
  }
  // Each head that each sequence has.
  template <class Function>
  void for_heads(Function&& function) const {
    share_out(batch_size * widest, [&](std::int64_t i) {
      const std::int64_t sequence = i / widest, head = i % widest;
      if (offsets[sequence] == offsets[sequence + 1]) return;
      if (widths == nullptr || head < widths[sequence]) function(sequence, head);
    });
  }
  template <class Function>
  void for_blocks(Function&& function) const {
    share_out(static_cast<std::int64_t>(blocks.size()),
              [&](std::int64_t i) { function(blocks[i]); });
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_cpu_training(const at::Tensor& hidden, const at::Tensor& qkv_weight,
                       const at::Tensor& qkv_bias, const at::Tensor& out_weight,
                       const at::Tensor& out_bias, const at::Tensor& norm_weight,
                       const at::Tensor& norm_bias, double norm_eps, std::int64_t num_heads,
                       const std::optional<at::Tensor>& num_heads_each,
                       const at::Tensor& cu_seqlens, std::int64_t /*max_seqlen*/, double dropout_p,
                       double attention_dropout_p, std::optional<std::int64_t> seed,
                       c10::string_view compute) {
  const Call call(hidden, qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias,
                  num_heads, num_heads_each, cu_seqlens, compute);
  const std::int64_t dim = call.dim;
  const at::TensorOptions kept = hidden.options().dtype(dtype_of(call.compute));
  const at::TensorOptions floats = hidden.options().dtype(at::kFloat);
  at::Tensor output = at::empty({call.tokens, call.size}, hidden.options());
  at::Tensor qkv = at::empty({call.tokens, num_heads, 3, dim}, kept);
  at::Tensor context = at::empty({call.tokens, num_heads, dim}, kept);
  at::Tensor log_sum = at::empty({num_heads, call.tokens}, floats);
  at::Tensor total = at::empty({call.tokens, call.size}, floats);
  at::Tensor kept_seed = mask_seed(seed, dropout_p > 0 || attention_dropout_p > 0);
  if (call.tokens == 0) return {output, qkv, context, log_sum, total, kept_seed};
  const GradientTable& table = active_gradients();
  ScratchFrame frame;
  const std::int64_t inner = 3 * dim;
  const ProjectArgs project{
      call.compute,
      matrix_of(kWho, call.hidden),
      call.size,
      0,
      pack_outputs(table, call.compute, matrix_of(kWho, call.qkv_weight), call.widest * inner,
                   call.size, frame),
      padded_floats(kWho, qkv_bias, round_up(call.limit * inner, kLanes), frame),
      qkv.mutable_data_ptr(),
      num_heads * inner};
  call.for_blocks([&](const TokenBlock& block) {
    ProjectArgs of_block = project;
    of_block.outputs = block.width * inner;
    table.project(of_block, block.first, block.last);
  });
  const bool is_drawn = !seed.has_value();
  const CoreArgs core{call.compute,
                      num_heads,
                      dim,
                      call.tokens,
                      call.offsets,
                      dropout_of(attention_dropout_p, kept_seed, is_drawn),
                      qkv.mutable_data_ptr(),
                      context.mutable_data_ptr(),
                      log_sum.mutable_data_ptr<float>(),
                      nullptr,
                      nullptr};
  call.for_heads(
      [&](std::int64_t sequence, std::int64_t head) { table.core_forward(core, sequence, head); });
  const ProjectTailArgs tail{
      call.compute,
      {call.element(), context.const_data_ptr(), num_heads * dim},
      0,
      pack_inputs(table, call.compute, matrix_of(kWho, call.out_weight), call.widest * dim,
                  call.size, frame),
      {call.size,
       {element_of(kWho, hidden), call.hidden.const_data_ptr(), output.mutable_data_ptr()},
       padded_floats(kWho, out_bias, call.c16, frame),
       padded_floats(kWho, norm_weight, call.c16, frame),
       padded_floats(kWho, norm_bias, call.c16, frame),
       static_cast<float>(norm_eps),
       total.mutable_data_ptr<float>(),
       dropout_of(dropout_p, kept_seed, is_drawn)}};
  call.for_blocks([&](const TokenBlock& block) {
    ProjectTailArgs of_block = tail;
    of_block.inputs = block.width * dim;
    table.project_tail(of_block, block.first, block.last);
  });
  return {output, qkv, context, log_sum, total, kept_seed};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_cpu_backward(const at::Tensor& gradient, const at::Tensor& qkv, const at::Tensor& context,
                       const at::Tensor& log_sum, const at::Tensor& total,
                       const at::Tensor& mask_seed, const at::Tensor& hidden,
                       const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
                       const at::Tensor& out_weight, const at::Tensor& out_bias,
                       const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                       std::int64_t num_heads, const std::optional<at::Tensor>& num_heads_each,
                       const at::Tensor& cu_seqlens, std::int64_t /*max_seqlen*/, double dropout_p,
                       double attention_dropout_p, std::optional<std::int64_t> seed,
                       c10::string_view compute) {
  const Call call(hidden, qkv_weight, qkv_bias, out_weight, out_bias, norm_weight, norm_bias,
                  num_heads, num_heads_each, cu_seqlens, compute);
  const std::int64_t dim = call.dim, inner = 3 * dim, bytes = 4 / per_unit(call.compute);
  check_shape(kWho, "gradient", gradient, {call.tokens, call.size});
  check_shape(kWho, "qkv", qkv, {call.tokens, num_heads, 3, dim});
  check_shape(kWho, "context", context, {call.tokens, num_heads, dim});
  check_shape(kWho, "log_sum", log_sum, {num_heads, call.tokens});
  check_shape(kWho, "total", total, {call.tokens, call.size});
  const at::Tensor upstream = gradient.contiguous();
  const GradientTable& table = active_gradients();
  ScratchFrame frame;
  const bool is_drawn = !seed.has_value();
  TailGradient tail =
      tail_gradient(table, kWho, call.compute, upstream, total, out_bias, norm_weight, norm_bias,
                    norm_eps, dropout_of(dropout_p, mask_seed, is_drawn), frame);
  at::Tensor hidden_gradient = at::empty({call.tokens, call.size}, hidden.options());
  void* context_gradient = frame.take(call.tokens * num_heads * dim * bytes);
  void* qkv_gradient = frame.take(call.tokens * num_heads * inner * bytes);
  {
    ScratchFrame panels_frame;
    const ProjectArgs project{call.compute,
                              {call.element(), tail.product, call.c16},
                              call.size,
                              0,
                              pack_outputs(table, call.compute, matrix_of(kWho, call.out_weight),
                                           call.widest * dim, call.size, panels_frame),
                              nullptr,
                              context_gradient,
                              num_heads * dim};
    call.for_blocks([&](const TokenBlock& block) {
      ProjectArgs of_block = project;
      of_block.outputs = block.width * dim;
      table.project(of_block, block.first, block.last);
    });
  }
  const CoreArgs core{call.compute,
                      num_heads,
                      dim,
                      call.tokens,
                      call.offsets,
                      dropout_of(attention_dropout_p, mask_seed, is_drawn),
                      const_cast<void*>(qkv.const_data_ptr()),
                      const_cast<void*>(context.const_data_ptr()),
                      const_cast<float*>(log_sum.const_data_ptr<float>()),
                      context_gradient,
                      qkv_gradient};
  call.for_heads(
      [&](std::int64_t sequence, std::int64_t head) { table.core_backward(core, sequence, head); });
  {
    ScratchFrame panels_frame;
    const ProjectHiddenArgs project{
        call.compute,
        {call.element(), qkv_gradient, num_heads * inner},
        0,
        call.size,
        pack_inputs(table, call.compute, matrix_of(kWho, call.qkv_weight), call.widest * inner,
                    call.size, panels_frame),
        tail.total,
        element_of(kWho, hidden),
        hidden_gradient.mutable_data_ptr()};
    call.for_blocks([&](const TokenBlock& block) {
      ProjectHiddenArgs of_block = project;
      of_block.inputs = block.width * inner;
      table.project_hidden(of_block, block.first, block.last);
    });
  }
  at::Tensor qkv_bias_gradient = at::empty(qkv_bias.sizes(), qkv_bias.options());
  const auto weight_gradient_of = [&](const void* rows, std::int64_t rows_per_head,
                                      const Matrix& tokens, const at::Tensor& like,
                                      at::Tensor* bias) {
    ScratchFrame panels_frame;
    return weight_gradient(
        table, kWho, call.compute, rows, num_heads * rows_per_head,
        packed_chunks(table, call.compute, token_chunks(call.blocks, rows_per_head), tokens,
                      call.size, panels_frame),
        like, bias);
  };
  const at::Tensor qkv_weight_gradient = weight_gradient_of(
      qkv_gradient, inner, matrix_of(kWho, call.hidden), call.qkv_weight, &qkv_bias_gradient);
  const at::Tensor out_weight_gradient =
      weight_gradient_of(context.const_data_ptr(), dim, {call.element(), tail.product, call.c16},
                         call.out_weight, nullptr);
  return {hidden_gradient, qkv_weight_gradient, qkv_bias_gradient, out_weight_gradient,
          tail.bias,       tail.norm_weight,    tail.norm_bias};
}

}  // namespace dynabert
