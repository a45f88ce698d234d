// The feed-forward sublayer as an op; the schema is in dynabert_kernels/ops/ffn/__init__.py.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "cpu/work.h"

namespace dynabert {

// Runs checked arguments at one width, or block by block where `blocks` are given.
void run_ffn(const FfnArgs& args, std::int64_t tokens, const std::vector<TokenBlock>& blocks);

at::Tensor ffn_cpu(const at::Tensor& hidden, const at::Tensor& up_weight, const at::Tensor& up_bias,
                   const at::Tensor& down_weight, const at::Tensor& down_bias,
                   const at::Tensor& norm_weight, const at::Tensor& norm_bias, double norm_eps,
                   c10::string_view activation, std::int64_t intermediate_size,
                   const std::optional<at::Tensor>& intermediate_sizes,
                   const std::optional<at::Tensor>& cu_seqlens, double dropout_p,
                   std::optional<std::int64_t> seed, c10::string_view compute);

}  // namespace dynabert
