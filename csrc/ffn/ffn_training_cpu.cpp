#include "checks.h"
#include "cpu/training.h"
#include "ffn/ffn_training.h"

namespace dynabert {
namespace {

constexpr const char* kWho = "ffn";

// The checked arguments both directions share.
struct Call {
  at::Tensor hidden, up_weight, down_weight;
  std::int64_t tokens, size, c16;
  std::int64_t limit, widest;  // neurons: of the weights, and of the widest prefix
  Compute compute;
  std::vector<TokenBlock> blocks;

  Call(const at::Tensor& hidden_, const at::Tensor& up, const at::Tensor& up_bias,
       const at::Tensor& down, const at::Tensor& down_bias, const at::Tensor& norm_weight,
       const at::Tensor& norm_bias, std::int64_t neurons, const std::optional<at::Tensor>& each,
       const std::optional<at::Tensor>& cu_seqlens, c10::string_view compute_name) {
    check_shape(kWho, "hidden", hidden_, {-1, -1});
    tokens = hidden_.size(0);
    size = hidden_.size(1);
    c16 = round_up(size, kLanes);
    check_shape(kWho, "up_weight", up, {-1, size});
    limit = up.size(0);
    check_shape(kWho, "up_bias", up_bias, {limit});
    check_shape(kWho, "down_weight", down, {limit, size});
    check_shape(kWho, "down_bias", down_bias, {size});
    check_shape(kWho, "norm_weight", norm_weight, {size});
    check_shape(kWho, "norm_bias", norm_bias, {size});
    const std::int32_t *widths = nullptr, *offsets = nullptr;
    std::int64_t batch_size = 0;
    if (each.has_value()) {
      DYNABERT_CHECK_VALUE(cu_seqlens.has_value(), kWho, "cu_seqlens", "None", "ragged offsets",
                           "One width per sequence needs them");
      check_offsets(kWho, *cu_seqlens, tokens);
      batch_size = cu_seqlens->numel() - 1;
      check_widths(kWho, "intermediate_size", *each, batch_size, limit);
      offsets = cu_seqlens->const_data_ptr<std::int32_t>();
      widths = each->const_data_ptr<std::int32_t>();
    } else {
      check_width(kWho, "intermediate_size", neurons, limit);
    }
    compute = parse_training_compute(kWho, compute_name);
    hidden = hidden_.contiguous();
    up_weight = up.contiguous();
    down_weight = down.contiguous();
    blocks = token_blocks(tokens, neurons, widths, offsets, batch_size);
    widest = 0;
    for (const TokenBlock& block : blocks) widest = std::max(widest, block.width);
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ffn_cpu_training(
    const at::Tensor& hidden, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double norm_eps, c10::string_view activation,
    std::int64_t intermediate_size, const std::optional<at::Tensor>& intermediate_sizes,
    const std::optional<at::Tensor>& cu_seqlens, double dropout_p, std::optional<std::int64_t> seed,
    c10::string_view compute) {
  const Call call(hidden, up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias,
                  intermediate_size, intermediate_sizes, cu_seqlens, compute);
  at::Tensor output = at::empty({call.tokens, call.size}, hidden.options());
  at::Tensor pre_activation =
      at::empty({call.tokens, intermediate_size}, hidden.options().dtype(dtype_of(call.compute)));
  at::Tensor total = at::empty({call.tokens, call.size}, hidden.options().dtype(at::kFloat));
  at::Tensor kept_seed = mask_seed(seed, dropout_p > 0);
  if (call.tokens == 0) return {output, pre_activation, total, kept_seed};
  const GradientTable& table = active_gradients();
  ScratchFrame frame;
  FfnForwardArgs args{
      call.compute,
      parse_activation(kWho, std::string(activation)),
      {call.size,
       {element_of(kWho, hidden), call.hidden.const_data_ptr(), output.mutable_data_ptr()},
       padded_floats(kWho, down_bias, call.c16, frame),
       padded_floats(kWho, norm_weight, call.c16, frame),
       padded_floats(kWho, norm_bias, call.c16, frame),
       static_cast<float>(norm_eps),
       total.mutable_data_ptr<float>(),
       dropout_of(dropout_p, kept_seed, !seed.has_value())},
      0,
      pack_outputs(table, call.compute, matrix_of(kWho, call.up_weight), call.widest, call.size,
                   frame),
      pack_inputs(table, call.compute, matrix_of(kWho, call.down_weight), call.widest, call.size,
                  frame),
      padded_floats(kWho, up_bias, round_up(call.limit, kLanes), frame),
      pre_activation.mutable_data_ptr(),
      intermediate_size};
  share_out(static_cast<std::int64_t>(call.blocks.size()), [&](std::int64_t i) {
    FfnForwardArgs of_block = args;
    of_block.neurons = call.blocks[i].width;
    table.ffn_forward(of_block, call.blocks[i].first, call.blocks[i].last);
  });
  return {output, pre_activation, total, kept_seed};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
ffn_cpu_backward(const at::Tensor& gradient, const at::Tensor& pre_activation,
                 const at::Tensor& total, const at::Tensor& mask_seed, const at::Tensor& hidden,
                 const at::Tensor& up_weight, const at::Tensor& up_bias,
                 const at::Tensor& down_weight, const at::Tensor& down_bias,
                 const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                 c10::string_view activation, std::int64_t intermediate_size,
                 const std::optional<at::Tensor>& intermediate_sizes,
                 const std::optional<at::Tensor>& cu_seqlens, double dropout_p,
                 std::optional<std::int64_t> seed, c10::string_view compute) {
  const Call call(hidden, up_weight, up_bias, down_weight, down_bias, norm_weight, norm_bias,
                  intermediate_size, intermediate_sizes, cu_seqlens, compute);
  check_shape(kWho, "gradient", gradient, {call.tokens, call.size});
  check_shape(kWho, "pre_activation", pre_activation, {call.tokens, intermediate_size});
  check_shape(kWho, "total", total, {call.tokens, call.size});
  const at::Tensor upstream = gradient.contiguous();
  const GradientTable& table = active_gradients();
  ScratchFrame frame;
  TailGradient tail =
      tail_gradient(table, kWho, call.compute, upstream, total, down_bias, norm_weight, norm_bias,
                    norm_eps, dropout_of(dropout_p, mask_seed, !seed.has_value()), frame);
  at::Tensor hidden_gradient = at::empty({call.tokens, call.size}, hidden.options());
  const Matrix up = matrix_of(kWho, call.up_weight), down = matrix_of(kWho, call.down_weight);
  const std::int64_t inner_stride = round_up(call.widest, kLanes);
  const std::int64_t bytes = 4 / per_unit(call.compute);
  void* up_gradient = frame.take(call.tokens * inner_stride * bytes);
  void* active = frame.take(call.tokens * inner_stride * bytes);
  {
    ScratchFrame panels_frame;
    const FfnBackwardArgs args{
        call.compute,
        parse_activation(kWho, std::string(activation)),
        call.size,
        0,
        pack_outputs(table, call.compute, down, call.widest, call.size, panels_frame),
        pack_inputs(table, call.compute, up, call.widest, call.size, panels_frame),
        pre_activation.const_data_ptr(),
        intermediate_size,
        tail.product,
        tail.total,
        up_gradient,
        active,
        inner_stride,
        element_of(kWho, hidden),
        hidden_gradient.mutable_data_ptr()};
    share_out(static_cast<std::int64_t>(call.blocks.size()), [&](std::int64_t i) {
      FfnBackwardArgs of_block = args;
      of_block.neurons = call.blocks[i].width;
      table.ffn_backward(of_block, call.blocks[i].first, call.blocks[i].last);
    });
  }
  at::Tensor up_bias_gradient = at::empty(up_bias.sizes(), up_bias.options());
  const std::vector<TokenChunk> chunks = token_chunks(call.blocks, 1);
  const auto weight_gradient_of = [&](const void* rows, const Matrix& tokens,
                                      const at::Tensor& like, at::Tensor* bias) {
    ScratchFrame panels_frame;
    return weight_gradient(
        table, kWho, call.compute, rows, inner_stride,
        packed_chunks(table, call.compute, chunks, tokens, call.size, panels_frame), like, bias);
  };
  const at::Tensor up_weight_gradient = weight_gradient_of(
      up_gradient, matrix_of(kWho, call.hidden), call.up_weight, &up_bias_gradient);
  const Element element =
      call.compute == Compute::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
  const at::Tensor down_weight_gradient =
      weight_gradient_of(active, {element, tail.product, call.c16}, call.down_weight, nullptr);
  return {hidden_gradient, up_weight_gradient, up_bias_gradient, down_weight_gradient,
          tail.bias,       tail.norm_weight,   tail.norm_bias};
}

}  // namespace dynabert
