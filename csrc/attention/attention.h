// The attention sublayer as an op; the schema is in dynabert_kernels/ops/attention/__init__.py.

#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "cpu/work.h"

namespace dynabert {

// Runs checked arguments at one width, or block by block where `blocks` are given.
void run_attention(const AttentionArgs& args, const std::vector<TokenBlock>& blocks);

// Bytes of AttentionArgs::qkv.
std::int64_t qkv_bytes(const AttentionPanels& panels, std::int64_t heads, std::int64_t tokens);

at::Tensor attention_cpu(const at::Tensor& hidden, const at::Tensor& qkv_weight,
                         const at::Tensor& qkv_bias, const at::Tensor& out_weight,
                         const at::Tensor& out_bias, const at::Tensor& norm_weight,
                         const at::Tensor& norm_bias, double norm_eps, std::int64_t num_heads,
                         const std::optional<at::Tensor>& num_heads_each,
                         const at::Tensor& cu_seqlens, std::int64_t max_seqlen, double dropout_p,
                         double attention_dropout_p, std::optional<std::int64_t> seed,
                         c10::string_view compute);

}  // namespace dynabert
