// Module dynabert_kernels._C: what Python needs to know about the CPU build. Tensor ops do not pass
// through here, they register with torch's dispatcher.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/isa.h"
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

}  // namespace
}  // namespace dynabert

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace dynabert;
  m.def("isa_name", &isa_name, "Instruction set in force.");
  m.def("supported_isas", &supported_isas,
        "Instruction sets this machine can run, narrowest first.");
  m.def("force_isa", &force_isa, "Forces an instruction set by name; an empty name forces none.");
  m.def("build_info", &build_info,
        "Compiler, flags, torch version and OpenMP version of the build.");
  m.def("parallel_for_threads", &parallel_for_threads, "Threads at::parallel_for runs on now.");
  m.def("attention_layout", [] { return names_and_shapes(kAttentionLayout); });
  m.def("ffn_layout", [] { return names_and_shapes(kFfnLayout); });
  m.def("qkv_parts", [] {
    return std::map<std::string, std::int64_t>{{"query", kQuery}, {"key", kKey}, {"value", kValue}};
  });
}
