// Chooses the instruction-set level at run time.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace jaxzip {

extern const KernelTable kKernels_generic;
#ifdef JAXZIP_HAVE_avx2
extern const KernelTable kKernels_avx2;
extern const KernelTable kKernels_avx512;
#endif

namespace {

std::vector<const KernelTable*> Available() {
  std::vector<const KernelTable*> levels = {&kKernels_generic};
#ifdef JAXZIP_HAVE_avx2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  if (avx2) levels.push_back(&kKernels_avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) {
    levels.push_back(&kKernels_avx512);
  }
#endif
  return levels;
}

const KernelTable* Find(const std::string& name) {
  const auto levels = Available();
  if (name.empty()) return levels.back();
  std::string known;
  for (const KernelTable* t : levels) {
    if (name == t->name) return t;
    known += std::string(known.empty() ? "" : ", ") + t->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available on this machine; available: " + known);
}

std::atomic<const KernelTable*>& Current() {
  static std::atomic<const KernelTable*> current = [] {
    const char* forced = std::getenv("JAXZIP_CPU_ISA");
    return Find(forced ? forced : "");
  }();
  return current;
}

}  // namespace

const KernelTable& Kernels() { return *Current().load(std::memory_order_relaxed); }

std::vector<std::string> IsaLevels() {
  std::vector<std::string> names;
  for (const KernelTable* t : Available()) names.emplace_back(t->name);
  return names;
}

void SetIsa(const std::string& name) { Current().store(Find(name)); }

}  // namespace jaxzip
