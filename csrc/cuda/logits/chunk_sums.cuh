// What a chunk leaves behind: its sum of exponentials and its best tokens.
#pragma once

#include "chunk.cuh"
#include "select.cuh"

namespace treedecode::cuda {

// Relative to a chunk's or row's maximum, which may be -inf.
__device__ __forceinline__ float base_of(float top) { return top == -kInf ? 0.0f : top; }

// Candidates of a row in a chunk: `slot` gets the chunk's best k tokens, and some more if they fit; the rest of it 0.
// Returns the least key that a token needs to be among them; 0 when all above -inf are.
template <typename T>
__device__ __forceinline__ uint64_t emit_best(Chunk<T>& chunk, int k, uint64_t* slot, int slot_len) {
  constexpr int N = kPerVector<T>;
  float tops[kVectors], top = -kInf;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    tops[j] = chunk.max_of(j);
    top = fmaxf(top, tops[j]);
  }
  // What the k-th largest of the maxima of disjoint sets of tokens reaches, at least k tokens reach, and with k below a
  // quarter of the sets not many more.
  const uint32_t nothing = ordered_bits(-kInf);
  uint32_t bar = nothing;
  if (k <= kLogitsThreads / 4) {
    bar = kth_largest<uint32_t>([&](const auto& visit) { visit(ordered_bits(top)); }, k);
  } else if (k <= kLogitsThreads * kVectors / 2) {
    bar = kth_largest<uint32_t>(
        [&](const auto& visit) {
#pragma unroll
          for (int j = 0; j < kVectors; ++j) visit(ordered_bits(tops[j]));
        },
        k);
  }
  const bool everything = bar <= nothing;
  if (everything) bar = nothing + 1;
  const float lowest = from_ordered_bits(bar);
  const auto each = [&](const auto& visit) {
    chunk.end_pass();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!(tops[j] >= lowest)) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float x = chunk.value(j, e);
        if (x >= lowest) visit(make_key(x, chunk.token(j) + e));
      }
    }
  };
  int count = 0;
  each([&](uint64_t) { ++count; });
  BlockScan<int> place = block_scan(count);
  uint64_t least = everything ? 0 : static_cast<uint64_t>(bar) << 32;
  if (place.total > slot_len) {
    least = kth_largest<uint64_t>(each, k);
    count = 0;
    each([&](uint64_t key) { count += key >= least; });
    place = block_scan(count);
  }
  each([&](uint64_t key) {
    if (key >= least) slot[place.before++] = key;
  });
  for (int i = place.total + ptx::thread(); i < slot_len; i += kLogitsThreads) slot[i] = 0;
  return least;
}

}  // namespace treedecode::cuda
