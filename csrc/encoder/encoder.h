// Consecutive layers as one op; the schema is in dynabert_kernels/ops/encoder.py.

#pragma once

#include <ATen/ATen.h>

namespace dynabert {

// Runs attention and feed-forward sublayers one after the other, as their ops would, bit for bit.
// Between two ops all threads meet two times; here they meet once per layer, because a block of
// rows goes from its attention through the feed-forward sublayer to the next layer's queries, keys
// and values without waiting for the others.
//   attention_weights, ffn_weights  six tensors a layer, in the order of csrc/layout.h
//   norm_eps                        two numbers a layer: attention, feed-forward
at::Tensor encoder_cpu(const at::Tensor& hidden, at::TensorList attention_weights,
                       at::TensorList ffn_weights, at::ArrayRef<double> norm_eps,
                       c10::string_view activation, at::IntArrayRef num_heads,
                       at::IntArrayRef intermediate_sizes, const at::Tensor& cu_seqlens,
                       c10::string_view compute);

}  // namespace dynabert
