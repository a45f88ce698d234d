// The feed-forward sublayer in training, as two ops; their schemas are in
// dynabert_kernels/ops/ffn/_cpu.py.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace dynabert {

// Output; pre-activation, what went into the norm, and the seed of the mask.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> ffn_cpu_training(
    const at::Tensor& hidden, const at::Tensor& up_weight, const at::Tensor& up_bias,
    const at::Tensor& down_weight, const at::Tensor& down_bias, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, double norm_eps, c10::string_view activation,
    std::int64_t intermediate_size, const std::optional<at::Tensor>& intermediate_sizes,
    const std::optional<at::Tensor>& cu_seqlens, double dropout_p, std::optional<std::int64_t> seed,
    c10::string_view compute);

// Gradients of hidden and the six weights.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
ffn_cpu_backward(const at::Tensor& gradient, const at::Tensor& pre_activation,
                 const at::Tensor& total, const at::Tensor& mask_seed, const at::Tensor& hidden,
                 const at::Tensor& up_weight, const at::Tensor& up_bias,
                 const at::Tensor& down_weight, const at::Tensor& down_bias,
                 const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                 c10::string_view activation, std::int64_t intermediate_size,
                 const std::optional<at::Tensor>& intermediate_sizes,
                 const std::optional<at::Tensor>& cu_seqlens, double dropout_p,
                 std::optional<std::int64_t> seed, c10::string_view compute);

}  // namespace dynabert
