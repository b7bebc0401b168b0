#include "isa.h"

#include <atomic>

namespace treedecode::cpu {
namespace {
std::atomic<int>& slot() {
  static std::atomic<int> active{static_cast<int>(detected_isa())};
  return active;
}
}  // namespace

Isa compiled_isa() {
#if defined(TD_HAVE_X86_ISAS)
  return Isa::Avx512Bf16;
#else
  return Isa::Generic;
#endif
}

Isa detected_isa() {
#if defined(TD_HAVE_X86_ISAS)
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::Avx512Bf16;
    if (avx512) return Isa::Avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::Avx2;
    return Isa::Generic;
  }();
  return best;
#else
  return Isa::Generic;
#endif
}

Isa active_isa() { return static_cast<Isa>(slot().load(std::memory_order_relaxed)); }

void set_active_isa(Isa isa) { slot().store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace treedecode::cpu
