// Runs CUDA kernels on the host: a fiber per thread, one running at a time until it reaches a barrier, a warp
// collective or an atomic, then another one, chosen by a seed. Kernels that forget a barrier, call a collective in some
// lanes only or wait for threads that never come are reported or give wrong results under some seed.
//
// Seed 0 always runs the first thread that can run, seed 1 the last one; other seeds draw.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <vector>

#include "runtime.h"

namespace simt {

using Site = std::source_location;

struct Options {
  uint64_t seed = 0;
  int resident_blocks = 1;     // blocks that run interleaved; the others follow
  const char* drop = nullptr;  // "file:line" of a sync_threads that is to do nothing
};
Options& options();

cudaError_t run(uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, int num_threads, size_t shared_bytes,
                const std::function<void()>& kernel);

// What the last failed run died of.
const char* error();
// "file:line" of every sync_threads that ran since the last call, newline separated.
const char* barriers();

// For ptx.h: called from inside of a thread.

struct Position {
  int thread;
  int num_threads;
  uint32_t block[3];
  uint32_t grid[3];
};
const Position& position();

// Ends the run with an error.
[[noreturn]] void fail(const Site& site, const char* text);
// Another thread may run here.
void maybe_yield();
// All other threads that can run do.
void back_off(const Site& site);
uint64_t random();

void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

// Waits at the block's barrier for all threads that have not ended; returns whether any of them gave true.
bool sync_threads(bool value, const Site& site);
void named_barrier(int id, int count, bool wait, const Site& site);

// What each lane of a warp brought to a collective.
struct Exchange {
  static constexpr size_t kBytes = 48;
  alignas(8) std::array<std::array<char, kBytes>, 32> operand;

  template <typename T>
  T get(int lane) const {
    T value;
    std::memcpy(&value, operand[lane].data(), sizeof(T));
    return value;
  }
};
// Waits for all lanes of `mask`.
Exchange collective(const char* name, uint32_t mask, const void* operand, size_t bytes, const Site& site);

template <typename T>
Exchange exchange(const char* name, uint32_t mask, const T& operand, const Site& site) {
  static_assert(sizeof(T) <= Exchange::kBytes);
  return collective(name, mask, &operand, sizeof(T), site);
}

// Copies of cp.async that are under way; they happen at any time from issue to wait.
void copy_later(void* to, const void* from, size_t bytes, bool valid, const Site& site);
void commit_copies();
void wait_for_copies(int num_pending_groups);

}  // namespace simt
