// The best k of a stream of logits: a running threshold in front of a small buffer of keys.
#pragma once

#include <cmath>
#include <limits>

#include "exp2.h"
#include "select.h"

namespace treedecode::cpu::TD_ISA {

struct Candidates {
  static constexpr int64_t kMaxSeeds = 2048;
  static constexpr int64_t kMaxSorted = 64;
  static int64_t buffer_len(int64_t k) { return 2 * k + 128; }
  // Elements between two checks of the threshold: so many that k candidates are a minority.
  static int64_t block_len(int64_t k) { return k <= 64 ? 1024 : k <= 256 ? 4096 : 16384; }

  uint64_t* keys;   // [buffer_len(k)]
  uint64_t* seeds;  // [kMaxSeeds] scratch
  int64_t k;
  int64_t n = 0;
  // A new candidate must be above it; at a tie the earlier token wins, which is among the candidates already.
  float threshold = -std::numeric_limits<float>::infinity();
  bool busy = true;                          // the last block brought many candidates
  float seed = 0.0f;                         // a logit that at least k tokens of this block reach
  int64_t num_to_seed = 0;                   // after this many more of them, candidates must be above the seed
  int64_t num_inserted = 0, num_before = 0;  // in all; before the block

  void raise(float value) { threshold = value > threshold ? value : threshold; }

  void compact() {
    const float kth = key_value(keep_largest(keys, n, k));
    n = k;
    raise(kth);
  }

  __attribute__((noinline)) void insert(Vec x, uint32_t lanes, int64_t token) {
    float value[Vec::N];
    x.store(value);
    for (; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (!(value[lane] > threshold)) continue;
      put(make_key(value[lane], static_cast<uint32_t>(token + lane)));
      ++num_inserted;
      if (value[lane] >= seed && --num_to_seed == 0) raise(seed);
    }
  }

  void put(uint64_t key) {
    if (k > kMaxSorted) {
      keys[n++] = key;
      if (n == buffer_len(k)) compact();
      return;
    }
    // Few candidates are always sorted, so that the threshold is as high as it can be.
    int64_t j = n < k ? n++ : k - 1;
    for (; j > 0 && keys[j - 1] < key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
    if (n == k) raise(key_value(keys[k - 1]));
  }

  // Raises the threshold before a block, if the last block brought many candidates, to one that at least k tokens of
  // the block reach: the k-th largest of at least k maxima over disjoint sets of lanes. Without this, every element of
  // an ascending row would be a candidate. load(i) returns lanes i to i + Vec::N.
  template <typename Load>
  void begin_block(int64_t begin, int64_t end, const Load& load) {
    busy |= 2 * (num_inserted - num_before) >= k;
    num_before = num_inserted;
    if (!busy) return;
    busy = false;
    const int64_t num = (k + Vec::N - 1) / Vec::N * Vec::N;
    if (num > kMaxSeeds || end - begin < 2 * num) return;
    alignas(64) float maxima[kMaxSeeds];
    for (int64_t s = 0; s < num; s += Vec::N) {
      Vec m = Vec::set(-std::numeric_limits<float>::infinity());
      for (int64_t i = begin + s; i + Vec::N <= end; i += num) m = max(load(i), m);
      m.store(maxima + s);
    }
    for (int64_t s = 0; s < num; ++s) seeds[s] = make_key(maxima[s], static_cast<uint32_t>(s));
    const float kth = key_value(keep_largest(seeds, num, k));
    if (!(kth > threshold)) return;
    threshold = just_below(kth);  // the tokens that reach it come later
    seed = kth;
    num_to_seed = k;
  }
};

}  // namespace treedecode::cpu::TD_ISA
