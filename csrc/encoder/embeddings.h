// What precedes the encoder, as ops; schemas in dynabert_kernels/ops/embeddings.py and varlen.py.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace dynabert {

// LayerNorm(word + position + segment) of the real tokens of a padded batch, [T][C] in the dtype of
// the tables: sums and norm in float32, rounded once.
//   input_ids       [B][S], int32 or int64, as all ids; every one is checked, padding included
//   position_ids    [B or 1][S]; without them a position is its column + first_position
//   token_type_ids  [B or 1][S]; without them 0
//   indices         [T], row * S + column of each real token; without them every token is real
//   tables          word [V][C], position [P][C], segment [N][C], norm weight [C], norm bias [C]
at::Tensor embeddings_cpu(const at::Tensor& input_ids,
                          const std::optional<at::Tensor>& position_ids,
                          std::int64_t first_position,
                          const std::optional<at::Tensor>& token_type_ids,
                          const std::optional<at::Tensor>& indices, at::TensorList tables,
                          double norm_eps);

// cu_seqlens [B + 1], indices [T] (empty where every token is real), longest sequence, T.
std::tuple<at::Tensor, at::Tensor, std::int64_t, std::int64_t> unpad_cpu(
    const at::Tensor& attention_mask);

}  // namespace dynabert
