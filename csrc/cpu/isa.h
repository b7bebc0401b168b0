// Chooses the instruction set of the CPU kernels at run time.
//
// Each csrc/cpu kernel source is compiled once per ISA with TD_ISA set to the ISA's namespace (see CMakeLists.txt).
// A kernel `foo` is declared for all of them with TD_DECLARE_KERNEL and reached through TD_DISPATCH(foo).
#pragma once

#include <cstdint>

namespace treedecode::cpu {

enum class Isa : int { Generic = 0, Avx2 = 1, Avx512 = 2, Avx512Bf16 = 3, AmxBf16 = 4 };

Isa compiled_isa();            // the best one in this build, which also holds every one below it
Isa detected_isa();            // the best this machine can run, of those compiled in
Isa active_isa();              // what TD_DISPATCH uses
void set_active_isa(Isa isa);  // caller checks isa <= detected_isa()

}  // namespace treedecode::cpu

// clang-format off
#if defined(TD_HAVE_X86_ISAS)
#define TD_DECLARE_KERNEL(name, ...)                    \
  namespace treedecode::cpu::generic { __VA_ARGS__; }     \
  namespace treedecode::cpu::avx2 { __VA_ARGS__; }        \
  namespace treedecode::cpu::avx512 { __VA_ARGS__; }      \
  namespace treedecode::cpu::avx512_bf16 { __VA_ARGS__; } \
  namespace treedecode::cpu::amx_bf16 { __VA_ARGS__; }
#define TD_DISPATCH(name)                                                                \
  (::treedecode::cpu::active_isa() == ::treedecode::cpu::Isa::AmxBf16                    \
       ? &::treedecode::cpu::amx_bf16::name                                              \
       : ::treedecode::cpu::active_isa() == ::treedecode::cpu::Isa::Avx512Bf16           \
             ? &::treedecode::cpu::avx512_bf16::name                                     \
             : ::treedecode::cpu::active_isa() == ::treedecode::cpu::Isa::Avx512         \
                   ? &::treedecode::cpu::avx512::name                                    \
                   : ::treedecode::cpu::active_isa() == ::treedecode::cpu::Isa::Avx2     \
                         ? &::treedecode::cpu::avx2::name                                \
                         : &::treedecode::cpu::generic::name)
#else
#define TD_DECLARE_KERNEL(name, ...) \
  namespace treedecode::cpu::generic { __VA_ARGS__; }
#define TD_DISPATCH(name) (&::treedecode::cpu::generic::name)
#endif
// clang-format on
