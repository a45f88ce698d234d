// Prepared weights: panels in prefix order, built once per version of the packed tensors and per
// precision, shared by every width (design law 5).

#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>

#include "cpu/kernel_table.h"

namespace dynabert {

// Memory of the panels: aligned to huge pages where there is enough to fill one, because a token
// block walks through all of it and 4 KiB pages cost a TLB miss for every 64 steps.
class PanelMemory {
 public:
  explicit PanelMemory(std::size_t bytes);
  ~PanelMemory();
  PanelMemory(const PanelMemory&) = delete;
  PanelMemory& operator=(const PanelMemory&) = delete;
  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  void* mapped_;
  std::size_t mapped_bytes_;
  std::byte* data_;
  std::size_t bytes_;
};

struct PreparedFfn {
  explicit PreparedFfn(std::size_t panel_bytes) : memory(panel_bytes) {}
  PanelMemory memory;
  at::Tensor floats;  // what FfnPanels points to besides the panels
  FfnPanels panels{};
};

struct PreparedAttention {
  explicit PreparedAttention(std::size_t panel_bytes) : memory(panel_bytes) {}
  PanelMemory memory;
  at::Tensor floats;
  AttentionPanels panels{};
};

// The six tensors of a sublayer, in the order of csrc/layout.h.
using WeightTensors = std::array<at::Tensor, 6>;

// The prepared form of these weights: the cached one, or a new one if there is none or a tensor has
// changed since. Safe to call from any thread. Throws ValueError where int8 meets a weight that is
// not finite, or where the weights were released and this form was not made before.
std::shared_ptr<const PreparedFfn> prepared_ffn(const WeightTensors& weights, double eps,
                                                Activation activation, Compute compute);
std::shared_ptr<const PreparedAttention> prepared_attention(const WeightTensors& weights,
                                                            double eps, Compute compute);

struct PreparedStats {
  std::int64_t entries, bytes, hits, builds;
  std::map<Compute, std::int64_t> bytes_by_form;
};
PreparedStats prepared_stats();
// Frees all forms but those of released weights, whose tensors are left without memory: nothing
// could build these again.
void clear_prepared();
// Forgets what was prepared from `tensor`'s storage; returns how many entries that were.
std::int64_t invalidate_prepared(const at::Tensor& tensor);

}  // namespace dynabert
