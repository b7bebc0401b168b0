// _cpu_threads(root) -> (threads, available): how many threads a loop has, and how many CPUs the process may use by the
// files below `root` ("" = the machine's own).
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "../cpu/cpu_count.h"

namespace treedecode {
namespace {

std::atomic<Threads> chosen{Threads::Torch};

std::tuple<int64_t, int64_t> cpu_threads(std::string root) { return {num_threads(), cpu::available_cpus(root)}; }

}  // namespace

void choose_threads(Threads threads) { chosen.store(threads, std::memory_order_relaxed); }

Threads chosen_threads() { return chosen.load(std::memory_order_relaxed); }

int num_threads() {
  // Torch counts the CPUs of the affinity mask, but not the CPU time that a container has.
  static const int available = cpu::available_cpus();
  static const bool is_set = std::getenv("OMP_NUM_THREADS") != nullptr || std::getenv("MKL_NUM_THREADS") != nullptr;
  const auto threads = static_cast<int>(torch::stable::get_num_threads());
  return threads > available && !is_set && cpu::is_default_threads(threads) ? available : threads;
}

STABLE_TORCH_LIBRARY_IMPL(treedecode, CompositeExplicitAutograd, m) { m.impl("_cpu_threads", TORCH_BOX(&cpu_threads)); }

}  // namespace treedecode
