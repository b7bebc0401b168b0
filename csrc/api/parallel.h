// Runs loops on several threads, those of torch or the library's own.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "../cpu/team.h"

namespace treedecode {

enum class Threads {
  Torch,  // threads that other ops of torch keep spinning anyway
  Team,   // `cpu::Team`, where a forward is one op and all ops around it are the library's own
};

// Chooses the threads of the loops that follow, in all ops of the process. Ops that run as part of either kind of
// forward, such as `sample`, follow the forward before them: two teams that spin would take each other's CPUs.
void choose_threads(Threads threads);
Threads chosen_threads();

// Returns how many threads a loop has: those of torch (OMP_NUM_THREADS, torch.set_num_threads), or the CPUs that the
// process may use where these are fewer and nobody has set the number.
int num_threads();

// Returns into how many pieces a loop is cut at most. The team's threads take several each, so that one that comes late
// or is taken off its CPU leaves most to the others, and so that at the end none waits long for the last piece.
inline int64_t max_pieces() {
  const int64_t threads = num_threads();
  return chosen_threads() == Threads::Torch || threads == 1 ? threads : 8 * threads;
}

// Calls f(piece_begin, piece_end) for pieces of [begin, end), each of at least `grain` elements where there are so
// many.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (chosen_threads() == Threads::Torch) return torch::stable::parallel_for(begin, end, grain, f);
  const int64_t size = end - begin, pieces = std::min((size + grain - 1) / grain, max_pieces());
  if (pieces == 1) return f(begin, end);
  const auto piece = [&](int64_t i) { f(begin + size * i / pieces, begin + size * (i + 1) / pieces); };
  cpu::Team::instance().run(
      pieces, num_threads(), [](const void* context, int64_t i) { (*static_cast<const decltype(piece)*>(context))(i); },
      &piece);
}

}  // namespace treedecode
