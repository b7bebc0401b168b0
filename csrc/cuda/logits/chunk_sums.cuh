// Results of one chunk of a row: the base of its sum of exponentials, and its best tokens.
#pragma once

#include "chunk.cuh"
#include "select.cuh"

namespace treedecode::cuda {

// The base that exponentials are relative to: the maximum, or 0 if that is -inf, because (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float base_of(float max_logit) { return max_logit == -kInf ? 0.0f : max_logit; }

// Writes the keys of the chunk's best k tokens to `slot`, and of some more if they fit; the rest of it is 0. Returns
// the smallest key of a token among them, 0 when all tokens above -inf are among them.
template <typename T>
__device__ __forceinline__ uint64_t emit_best(Chunk<T>& chunk, int k, uint64_t* slot, int slot_len) {
  constexpr int N = kPerVector<T>;
  float vector_max[kVectors], thread_max = -kInf;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    vector_max[j] = chunk.max_of(j);
    thread_max = fmaxf(thread_max, vector_max[j]);
  }
  // A threshold that at least k tokens reach: the k-th largest maximum of disjoint sets of tokens. Where k is below a
  // quarter of the number of sets, not many more than k tokens reach it.
  const uint32_t minus_inf = ordered_bits(-kInf);
  uint32_t threshold_bits = minus_inf;
  if (k <= kLogitsThreads / 4) {
    threshold_bits = kth_largest<uint32_t>([&](const auto& visit) { visit(ordered_bits(thread_max)); }, k);
  } else if (k <= kLogitsThreads * kVectors / 2) {
    threshold_bits = kth_largest<uint32_t>(
        [&](const auto& visit) {
#pragma unroll
          for (int j = 0; j < kVectors; ++j) visit(ordered_bits(vector_max[j]));
        },
        k);
  }
  const bool takes_all = threshold_bits <= minus_inf;
  if (takes_all) threshold_bits = minus_inf + 1;
  const float threshold = from_ordered_bits(threshold_bits);
  const auto each = [&](const auto& visit) {
    chunk.end_pass();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!(vector_max[j] >= threshold)) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float x = chunk.value(j, e);
        if (x >= threshold) visit(make_key(x, chunk.token(j) + e));
      }
    }
  };
  int count = 0;
  each([&](uint64_t) { ++count; });
  BlockScan<int> scan = block_scan(count);
  uint64_t min_key = takes_all ? 0 : static_cast<uint64_t>(threshold_bits) << 32;
  if (scan.total > slot_len) {
    min_key = kth_largest<uint64_t>(each, k);
    count = 0;
    each([&](uint64_t key) { count += key >= min_key; });
    scan = block_scan(count);
  }
  each([&](uint64_t key) {
    if (key >= min_key) slot[scan.before++] = key;
  });
  for (int i = scan.total + ptx::thread(); i < slot_len; i += kLogitsThreads) slot[i] = 0;
  return min_key;
}

}  // namespace treedecode::cuda
