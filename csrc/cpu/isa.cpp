#include "cpu/isa.h"

#include <atomic>

#include "checks.h"

namespace dynabert {

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAvx512VnniTable;
extern const KernelTable kAvx512Bf16Table;
#endif

namespace {

struct Level {
  Isa isa;
  const char* name;
  const KernelTable* table;
};

constexpr Level kLevels[] = {
    {Isa::kScalar, "scalar", &kScalarTable},
#if defined(__x86_64__)
    {Isa::kAvx2, "avx2", &kAvx2Table},
    {Isa::kAvx512, "avx512", &kAvx512Table},
    {Isa::kAvx512Vnni, "avx512_vnni", &kAvx512VnniTable},
    {Isa::kAvx512Bf16, "avx512_bf16", &kAvx512Bf16Table},
#endif
};

// The compiler's builtins ask both cpuid and, through xgetbv, whether the operating system saves
// the wide registers: a CPU flag alone is not enough.
Isa detect_widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Vnni;
  return Isa::kAvx512Bf16;
#else
  return Isa::kScalar;
#endif
}

Isa widest() {
  static const Isa isa = detect_widest();
  return isa;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

const Level& active_level() {
  const Isa isa = active().load(std::memory_order_relaxed);
  for (const Level& level : kLevels) {
    if (level.isa == isa) return level;
  }
  TORCH_INTERNAL_ASSERT(false, "every Isa has a row in kLevels");
}

std::string joined_supported() {
  std::string names;
  for (const std::string& name : supported_isas()) names += names.empty() ? name : ", " + name;
  return names;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.isa <= widest()) names.emplace_back(level.name);
  }
  return names;
}

std::string isa_name() { return active_level().name; }

const KernelTable& active_table() { return *active_level().table; }

void force_isa(const std::string& name) {
  if (name.empty()) {
    active().store(widest());
    return;
  }
  for (const Level& level : kLevels) {
    if (name == level.name && level.isa <= widest()) {
      active().store(level.isa);
      return;
    }
  }
  DYNABERT_CHECK_VALUE(false, "force_isa", "name", "'" + name + "'",
                       "one of " + joined_supported() + " on this CPU",
                       "An empty name means the widest.");
}

}  // namespace dynabert
