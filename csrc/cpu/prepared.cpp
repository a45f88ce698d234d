#include "cpu/prepared.h"

#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/pack.h"

namespace dynabert {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = 4096;

std::size_t rounded(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

PanelMemory::PanelMemory(std::size_t bytes) : bytes_(bytes) {
  // Mapped afresh, never from malloc: memory that the process has used before stays in small pages
  // whatever is advised.
  mapped_bytes_ = rounded(bytes, kPage) + (bytes >= kHugePage ? kHugePage : 0);
  mapped_ =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(mapped_);
  data_ = reinterpret_cast<std::byte*>(bytes >= kHugePage ? rounded(address, kHugePage) : address);
#ifdef MADV_HUGEPAGE
  // A hint: where it fails, pages are small.
  if (bytes >= kHugePage) madvise(data_, rounded(bytes, kPage), MADV_HUGEPAGE);
#endif
}

PanelMemory::~PanelMemory() { munmap(mapped_, mapped_bytes_); }

namespace {

// Released weights have none.
bool has_memory(const c10::StorageImpl& storage) { return storage.nbytes() > 0; }

// What a prepared form was made from. The storage is held weakly: it may be freed, and its address
// used again, without the key being mistaken for that of the newcomer.
struct Source {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::int64_t offset;
  std::vector<std::int64_t> sizes, strides;
  at::ScalarType dtype;
  std::int64_t version;

  static std::int64_t version_of(const at::Tensor& tensor) {
    // Inference tensors have no counter; whoever writes to one calls `invalidate`.
    return tensor.is_inference() ? 0 : static_cast<std::int64_t>(tensor._version());
  }

  explicit Source(const at::Tensor& tensor)
      : storage(tensor.storage().getWeakStorageImpl()),
        offset(tensor.storage_offset()),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()),
        version(version_of(tensor)) {}

  // Of the same memory and form; the version may differ.
  bool is_of(const at::Tensor& tensor) const {
    return tensor.storage().unsafeGetStorageImpl() == storage._unsafe_get_target() &&
           !storage.expired() && tensor.storage_offset() == offset && tensor.sizes() == sizes &&
           tensor.strides() == strides && tensor.scalar_type() == dtype;
  }
};

struct Entry {
  std::vector<Source> sources;
  double eps;
  int activation;
  std::shared_ptr<const void> prepared;
  std::int64_t bytes;

  bool is_of(const WeightTensors& weights, double of_eps, int of_activation) const {
    if (eps != of_eps || activation != of_activation) return false;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (!sources[i].is_of(weights[i])) return false;
    }
    return true;
  }
  bool is_current(const WeightTensors& weights) const {
    for (std::size_t i = 0; i < weights.size(); ++i) {
      if (sources[i].version != Source::version_of(weights[i])) return false;
    }
    return true;
  }
  bool is_dead() const {
    for (const Source& source : sources) {
      if (source.storage.expired()) return true;
    }
    return false;
  }
  // Whether the weights are gone and this form is what is left of them.
  bool is_released() const {
    const auto storage = sources[0].storage.lock();
    return storage && !has_memory(*storage);
  }
};

class Cache {
 public:
  template <class Prepared, class Build>
  std::shared_ptr<const Prepared> get(const WeightTensors& weights, double eps, int activation,
                                      Compute compute, Build&& build) {
    const Key key{weights[0].storage().unsafeGetStorageImpl(), weights[0].storage_offset(),
                  compute};
    const std::lock_guard<std::mutex> lock(mutex_);
    auto [at, end] = entries_.equal_range(key);
    for (; at != end; ++at) {
      if (!at->second.is_of(weights, eps, activation)) continue;
      if (at->second.is_current(weights)) {
        ++hits_;
        return std::static_pointer_cast<const Prepared>(at->second.prepared);
      }
      entries_.erase(at);
      break;
    }
    for (const at::Tensor& tensor : weights) {
      DYNABERT_CHECK_VALUE(
          tensor.numel() == 0 || has_memory(*tensor.storage().unsafeGetStorageImpl()),
          "prepared weights", "weights", "released", "a form and settings that were kept",
          "Load the model again");
    }
    drop_dead();
    // Built under the lock: threads that ask for the same weights wait for one form.
    const std::shared_ptr<const Prepared> prepared = build();
    Entry entry{{},
                eps,
                activation,
                prepared,
                static_cast<std::int64_t>(prepared->memory.size() + prepared->floats.nbytes())};
    for (const at::Tensor& tensor : weights) entry.sources.emplace_back(tensor);
    entries_.emplace(key, std::move(entry));
    ++builds_;
    return prepared;
  }

  PreparedStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    PreparedStats stats{static_cast<std::int64_t>(entries_.size()), 0, hits_, builds_, {}};
    for (const auto& [key, entry] : entries_) {
      stats.bytes += entry.bytes;
      stats.bytes_by_form[std::get<Compute>(key)] += entry.bytes;
    }
    return stats;
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(entries_, [](const auto& item) { return !item.second.is_released(); });
  }

  std::int64_t invalidate(const at::Tensor& tensor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<std::int64_t>(std::erase_if(entries_, [&](const auto& item) {
      for (const Source& source : item.second.sources) {
        if (source.storage._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl()) {
          return true;
        }
      }
      return false;
    }));
  }

 private:
  using Key = std::tuple<const void*, std::int64_t, Compute>;

  void drop_dead() {
    std::erase_if(entries_, [](const auto& item) { return item.second.is_dead(); });
  }

  std::mutex mutex_;
  std::multimap<Key, Entry> entries_;
  std::int64_t hits_ = 0, builds_ = 0;
};

// Never destroyed: tensors of other static objects may outlive it.
Cache& cache() {
  static Cache* const instance = new Cache();
  return *instance;
}

at::Tensor as_float(const at::Tensor& tensor) {
  return tensor.detach().to(at::kFloat).contiguous();
}

void check_finite(const char* who, const char* name, const at::Tensor& tensor) {
  DYNABERT_CHECK_VALUE(at::isfinite(tensor).all().item<bool>(), who, name,
                       "a tensor with NaN or infinity", "finite weights",
                       "int8 has no form for them; look for the step that made them");
}

// Weights of a product that reads the residual stream, [..., C]: where int8 mixes the channels of a
// token, those of a weight are mixed too, by the inverse, so that the product stays the same.
at::Tensor spread_weight(const at::Tensor& weight) {
  const std::int64_t vectors = spread_of(weight.size(-1));
  at::Tensor spread = weight;
  for (std::int64_t stride = kLanes; stride < vectors * kLanes; stride *= 2) {
    const at::Tensor pairs = spread.reshape({-1, 2, stride});
    const at::Tensor first = pairs.select(1, 0), second = pairs.select(1, 1);
    spread = at::stack({first + second, first - second}, 1);
  }
  return (spread / static_cast<double>(vectors)).reshape(weight.sizes());
}

// Largest |w| / 127 over all other dimensions; 1 where that is zero.
at::Tensor scales_of(const at::Tensor& matrix, std::int64_t reduced) {
  const at::Tensor largest = matrix.abs().amax(reduced) / 127.0;
  return at::where(largest == 0, at::ones_like(largest), largest).contiguous();
}

// Copies `parts` one after the other into one tensor, each padded with zeros to its size.
class Floats {
 public:
  void add(const at::Tensor& values, std::int64_t size, const float** where) {
    parts_.push_back({values.reshape({-1}), size, where});
  }
  at::Tensor finish() {
    std::int64_t total = 0;
    for (const Part& part : parts_) total += part.size;
    at::Tensor all = at::zeros({total}, at::kFloat);
    std::int64_t at = 0;
    for (const Part& part : parts_) {
      all.narrow(0, at, part.values.numel()).copy_(part.values);
      *part.where = all.const_data_ptr<float>() + at;
      at += part.size;
    }
    return all;
  }

 private:
  struct Part {
    at::Tensor values;
    std::int64_t size;
    const float** where;
  };
  std::vector<Part> parts_;
};

void add_norm(Floats& floats, NormWeights& norm, const at::Tensor& bias, const at::Tensor& scale,
              const WeightTensors& weights, double eps, std::int64_t c16) {
  norm.eps = static_cast<float>(eps);
  floats.add(as_float(bias), c16, &norm.bias);
  if (scale.defined()) floats.add(scale, c16, &norm.scale);
  floats.add(as_float(weights[4]), c16, &norm.norm_weight);
  floats.add(as_float(weights[5]), c16, &norm.norm_bias);
}

std::shared_ptr<const PreparedFfn> build_ffn(const WeightTensors& weights, double eps,
                                             Activation activation, Compute compute) {
  at::Tensor up = as_float(weights[0]);
  const at::Tensor down = as_float(weights[2]);
  const std::int64_t neurons = up.size(0), hidden = up.size(1), unit = per_unit(compute);
  const std::int64_t c16 = round_up(hidden, kLanes), groups = ceil_div(neurons, kNeuronGroup);
  const std::int64_t up_steps = ceil_div(hidden, unit), down_steps = kNeuronGroup / unit;
  const std::int64_t up_bytes = kNeuronGroup / kLanes * up_steps * kStepBytes;
  const std::int64_t group_bytes = up_bytes + c16 / kLanes * down_steps * kStepBytes;
  at::Tensor up_scale, down_scale;
  if (compute == Compute::kInt8) {
    check_finite("ffn", "up_weight", up);
    check_finite("ffn", "down_weight", down);
    up = spread_weight(up);
    up_scale = scales_of(up, 1);
    down_scale = scales_of(down, 0);
  }
  auto prepared = std::make_shared<PreparedFfn>(groups * group_bytes);
  FfnPanels& panels = prepared->panels;
  panels.compute = compute;
  panels.activation = activation;
  panels.hidden_size = hidden;
  panels.intermediate_size = neurons;
  panels.up_steps = up_steps;
  panels.group_bytes = group_bytes;
  panels.data = prepared->memory.data();
  Floats floats;
  floats.add(as_float(weights[1]), groups * kNeuronGroup, &panels.up_bias);
  if (up_scale.defined()) floats.add(up_scale, groups * kNeuronGroup, &panels.up_scale);
  add_norm(floats, panels.norm, weights[3], down_scale, weights, eps, c16);
  prepared->floats = floats.finish();

  const float* up_data = up.const_data_ptr<float>();
  const float* down_data = down.const_data_ptr<float>();
  at::parallel_for(0, groups, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t group = first; group < last; ++group) {
      const std::int64_t at = group * kNeuronGroup;
      const std::int64_t count = std::min(kNeuronGroup, neurons - at);
      std::byte* to = prepared->memory.data() + group * group_bytes;
      std::fill(to, to + group_bytes, std::byte{0});
      pack_panels({up_data + at * hidden, count, hidden, hidden, 1}, compute,
                  up_scale.defined() ? up_scale.const_data_ptr<float>() + at : nullptr, up_steps,
                  up_steps * kStepBytes, to);
      pack_panels({down_data + at * hidden, hidden, count, 1, hidden}, compute,
                  down_scale.defined() ? down_scale.const_data_ptr<float>() : nullptr, down_steps,
                  down_steps * kStepBytes, to + up_bytes);
    }
  });
  return prepared;
}

std::shared_ptr<const PreparedAttention> build_attention(const WeightTensors& weights, double eps,
                                                         Compute compute) {
  at::Tensor qkv = as_float(weights[0]);
  const at::Tensor out = as_float(weights[2]);
  const std::int64_t heads = qkv.size(0), dim = qkv.size(2), hidden = qkv.size(3);
  const std::int64_t unit = per_unit(compute);
  const std::int64_t c16 = round_up(hidden, kLanes), d16 = round_up(dim, kLanes);
  const std::int64_t qkv_steps = ceil_div(hidden, unit), out_steps = dim / unit;
  const std::int64_t part_bytes = d16 / kLanes * qkv_steps * kStepBytes;
  const std::int64_t head_bytes = 3 * part_bytes + c16 / kLanes * out_steps * kStepBytes;
  at::Tensor qkv_scale, out_scale;
  if (compute == Compute::kInt8) {
    check_finite("attention", "qkv_weight", qkv);
    check_finite("attention", "out_weight", out);
    qkv = spread_weight(qkv);
    qkv_scale = scales_of(qkv, 3);
    out_scale = scales_of(out.reshape({heads * dim, hidden}), 0);
  }
  auto prepared = std::make_shared<PreparedAttention>(heads * head_bytes);
  AttentionPanels& panels = prepared->panels;
  panels.compute = compute;
  panels.hidden_size = hidden;
  panels.num_heads = heads;
  panels.head_dim = dim;
  panels.qkv_steps = qkv_steps;
  panels.head_bytes = head_bytes;
  panels.data = prepared->memory.data();
  Floats floats;
  const auto padded = [&](const at::Tensor& per_row) {
    return at::constant_pad_nd(per_row, {0, d16 - dim});
  };
  floats.add(padded(as_float(weights[1])), heads * 3 * d16, &panels.qkv_bias);
  if (qkv_scale.defined()) floats.add(padded(qkv_scale), heads * 3 * d16, &panels.qkv_scale);
  add_norm(floats, panels.norm, weights[3], out_scale, weights, eps, c16);
  prepared->floats = floats.finish();

  const float* qkv_data = qkv.const_data_ptr<float>();
  const float* out_data = out.const_data_ptr<float>();
  at::parallel_for(0, heads, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t head = first; head < last; ++head) {
      std::byte* to = prepared->memory.data() + head * head_bytes;
      for (std::int64_t part = 0; part < 3; ++part) {
        const std::int64_t row = (head * 3 + part) * dim;
        pack_panels({qkv_data + row * hidden, dim, hidden, hidden, 1}, compute,
                    qkv_scale.defined() ? qkv_scale.const_data_ptr<float>() + row : nullptr,
                    qkv_steps, qkv_steps * kStepBytes, to + part * part_bytes);
      }
      pack_panels({out_data + head * dim * hidden, hidden, dim, 1, hidden}, compute,
                  out_scale.defined() ? out_scale.const_data_ptr<float>() : nullptr, out_steps,
                  out_steps * kStepBytes, to + 3 * part_bytes);
    }
  });
  return prepared;
}

}  // namespace

std::shared_ptr<const PreparedFfn> prepared_ffn(const WeightTensors& weights, double eps,
                                                Activation activation, Compute compute) {
  return cache().get<PreparedFfn>(weights, eps, static_cast<int>(activation), compute,
                                  [&] { return build_ffn(weights, eps, activation, compute); });
}

std::shared_ptr<const PreparedAttention> prepared_attention(const WeightTensors& weights,
                                                            double eps, Compute compute) {
  return cache().get<PreparedAttention>(weights, eps, -1, compute,
                                        [&] { return build_attention(weights, eps, compute); });
}

PreparedStats prepared_stats() { return cache().stats(); }
void clear_prepared() { cache().clear(); }
std::int64_t invalidate_prepared(const at::Tensor& tensor) { return cache().invalidate(tensor); }

}  // namespace dynabert
