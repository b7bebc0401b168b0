// _cpu_isa(isa) -> (active, detected, compiled): chooses the CPU instruction set; -1 changes nothing.
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "../cpu/isa.h"

namespace treedecode {
namespace {

std::tuple<int64_t, int64_t, int64_t> cpu_isa(int64_t isa) {
  const auto detected = static_cast<int64_t>(cpu::detected_isa());
  STD_TORCH_CHECK(isa >= -1 && isa <= detected, "[ValueError] isa: this machine runs levels 0 to ", detected, ", got ",
                  isa);
  if (isa >= 0) cpu::set_active_isa(static_cast<cpu::Isa>(isa));
  return {static_cast<int64_t>(cpu::active_isa()), detected, static_cast<int64_t>(cpu::compiled_isa())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace treedecode
