// The attention sublayer in training, as two ops; their schemas are in
// dynabert_kernels/ops/attention/_cpu.py.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace dynabert {

// Output; queries, keys and values, context, logarithms of the softmax sums, what went into the
// norm, and the seed of the masks.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_cpu_training(const at::Tensor& hidden, const at::Tensor& qkv_weight,
                       const at::Tensor& qkv_bias, const at::Tensor& out_weight,
                       const at::Tensor& out_bias, const at::Tensor& norm_weight,
                       const at::Tensor& norm_bias, double norm_eps, std::int64_t num_heads,
                       const std::optional<at::Tensor>& num_heads_each,
                       const at::Tensor& cu_seqlens, std::int64_t max_seqlen, double dropout_p,
                       double attention_dropout_p, std::optional<std::int64_t> seed,
                       c10::string_view compute);

// Gradients of hidden and the six weights.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_cpu_backward(const at::Tensor& gradient, const at::Tensor& qkv, const at::Tensor& context,
                       const at::Tensor& log_sum, const at::Tensor& total,
                       const at::Tensor& mask_seed, const at::Tensor& hidden,
                       const at::Tensor& qkv_weight, const at::Tensor& qkv_bias,
                       const at::Tensor& out_weight, const at::Tensor& out_bias,
                       const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                       std::int64_t num_heads, const std::optional<at::Tensor>& num_heads_each,
                       const at::Tensor& cu_seqlens, std::int64_t max_seqlen, double dropout_p,
                       double attention_dropout_p, std::optional<std::int64_t> seed,
                       c10::string_view compute);

}  // namespace dynabert
