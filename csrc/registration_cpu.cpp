// Module dynabert_kernels._C: what Python needs to know about the CPU build, and the registration
// of the ops' CPU kernels with torch's dispatcher. Their schemas are in Python.

#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_training.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/prepared.h"
#include "cpu/work.h"
#include "encoder/embeddings.h"
#include "encoder/encoder.h"
#include "ffn/ffn.h"
#include "ffn/ffn_training.h"
#include "layout.h"

namespace dynabert {
namespace {

// Threads that really enter at::parallel_for, counted by running one with an iteration per thread.
// A build without -fopenmp answers 1 whatever torch.set_num_threads says.
int parallel_for_threads() {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, at::get_num_threads(), /*grain_size=*/1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int>(seen.size());
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"flags", DYNABERT_BUILD_FLAGS},
      {"torch", DYNABERT_BUILD_TORCH},
#ifdef _OPENMP
      {"openmp", std::to_string(_OPENMP)},
#else
      {"openmp", "off"},
#endif
  };
}

template <std::size_t kCount>
std::vector<std::pair<std::string, std::string>> names_and_shapes(
    const PackedTensor (&tensors)[kCount]) {
  std::vector<std::pair<std::string, std::string>> rows;
  for (const PackedTensor& tensor : tensors) rows.emplace_back(tensor.name, tensor.shape);
  return rows;
}

std::map<std::string, std::int64_t> stats_by_name() {
  const PreparedStats stats = prepared_stats();
  return {{"entries", stats.entries},
          {"bytes", stats.bytes},
          {"hits", stats.hits},
          {"builds", stats.builds}};
}

std::map<std::string, std::int64_t> bytes_by_form() {
  static const std::string kNames[] = {"float32", "bfloat16", "int8"};  // in the order of Compute
  std::map<std::string, std::int64_t> forms;
  for (const auto& [compute, bytes] : prepared_stats().bytes_by_form) {
    forms[kNames[static_cast<std::size_t>(compute)]] = bytes;
  }
  return forms;
}

at::Tensor activate(const std::string& name, const at::Tensor& x) {
  const at::Tensor from = x.to(at::kFloat).contiguous();
  at::Tensor to = at::empty_like(from);
  active_table().activate(parse_activation("activate", name), from.const_data_ptr<float>(),
                          to.mutable_data_ptr<float>(), from.numel());
  return to;
}

}  // namespace
}  // namespace dynabert

TORCH_LIBRARY_IMPL(dynabert, CPU, m) {
  m.impl("ffn.cpu", &dynabert::ffn_cpu);
  m.impl("attention.cpu", &dynabert::attention_cpu);
  m.impl("encoder.cpu", &dynabert::encoder_cpu);
  m.impl("embeddings.cpu", &dynabert::embeddings_cpu);
  m.impl("unpad.cpu", &dynabert::unpad_cpu);
  m.impl("ffn.cpu_training", &dynabert::ffn_cpu_training);
  m.impl("ffn.cpu_backward", &dynabert::ffn_cpu_backward);
  m.impl("attention.cpu_training", &dynabert::attention_cpu_training);
  m.impl("attention.cpu_backward", &dynabert::attention_cpu_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace dynabert;
  m.def("isa_name", &isa_name, "Instruction set in force.");
  m.def("supported_isas", &supported_isas,
        "Instruction sets this machine can run, narrowest first.");
  m.def("force_isa", &force_isa, "Forces an instruction set by name; an empty name forces none.");
  m.def("build_info", &build_info,
        "Compiler, flags, torch version and OpenMP version of the build.");
  m.def("parallel_for_threads", &parallel_for_threads, "Threads at::parallel_for runs on now.");
  m.def("prepared_stats", &stats_by_name,
        "Prepared weights: entries, bytes, and how often one was found or built.");
  m.def("prepared_forms", &bytes_by_form, "Bytes of the prepared weights of each precision.");
  m.def("clear_prepared", &clear_prepared, "Frees every prepared form that can be built again.");
  m.def("invalidate_prepared", &invalidate_prepared,
        "Forgets what was prepared from the storage of a tensor; returns the number of forms.");
  m.def("neuron_group", [] { return kNeuronGroup; }, "Neurons of one reduction block.");
  m.def("measure_peak", &measure_peak, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Best rate of a kind on some threads, in operations or bytes per second.");
  m.def("activate", &activate, "An activation of float32 values, as the kernels compute it.");
  m.def("attention_layout", [] { return names_and_shapes(kAttentionLayout); });
  m.def("ffn_layout", [] { return names_and_shapes(kFfnLayout); });
  m.def("qkv_parts", [] {
    return std::map<std::string, std::int64_t>{{"query", kQuery}, {"key", kKey}, {"value", kValue}};
  });
}
