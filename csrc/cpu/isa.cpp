#include "isa.h"

#include <atomic>

#if defined(TD_HAVE_X86_ISAS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace treedecode::cpu {
namespace {

// True if the CPU has tile registers and the system lets this process use them, which it does on request (Linux 5.16).
bool may_use_amx() {
#if defined(TD_HAVE_X86_ISAS) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<int>& slot() {
  static std::atomic<int> active{static_cast<int>(detected_isa())};
  return active;
}
}  // namespace

Isa compiled_isa() {
#if defined(TD_HAVE_X86_ISAS)
  return Isa::AmxBf16;
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
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return may_use_amx() ? Isa::AmxBf16 : Isa::Avx512Bf16;
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
