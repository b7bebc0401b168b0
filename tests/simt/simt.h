// Runs CUDA kernels on the host, with a fiber per thread. One fiber runs at a time, until it reaches a barrier, a warp
// collective or an atomic; then a seed chooses the next one. Kernels that forget a barrier, call a collective in some
// lanes only or wait for threads that never arrive are reported, or give wrong results under some seed.
//
// Seed 0 always runs the first thread that can run, seed 1 the last one; other seeds draw at random.
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
  int resident_blocks = 1;     // blocks that run interleaved; the others run later
  const char* drop = nullptr;  // "file:line" of a sync_threads that shall do nothing
};
Options& options();

cudaError_t run(uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, int num_threads, size_t shared_bytes,
                const std::function<void()>& kernel);

// The error of the last failed run.
const char* error();
// "file:line" of every sync_threads that ran since the last call, newline separated.
const char* barriers();

// For ptx.h: called by the threads of a run.

struct Position {
  int thread;
  int num_threads;
  uint32_t block[3];
  uint32_t grid[3];
};
const Position& position();

// Ends the run with an error.
[[noreturn]] void fail(const Site& site, const char* text);
// Lets another thread run, or not.
void maybe_yield();
// Lets all other threads run that can.
void back_off(const Site& site);
uint64_t random();

void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

// Waits at the block's barrier for all threads that have not ended; returns true if any of them passed true.
bool sync_threads(bool value, const Site& site);
void named_barrier(int id, int count, bool wait, const Site& site);

// Operands of a collective, by lane of the warp.
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
// Waits for all lanes of `mask`, and returns their operands.
Exchange collective(const char* name, uint32_t mask, const void* operand, size_t bytes, const Site& site);

template <typename T>
Exchange exchange(const char* name, uint32_t mask, const T& operand, const Site& site) {
  static_assert(sizeof(T) <= Exchange::kBytes);
  return collective(name, mask, &operand, sizeof(T), site);
}

// Copies of cp.async, which happen at any time from issue to wait.
void copy_later(void* to, const void* from, size_t bytes, bool valid, const Site& site);
void commit_copies();
void wait_for_copies(int num_pending_groups);

}  // namespace simt
