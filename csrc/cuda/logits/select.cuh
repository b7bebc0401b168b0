// Radix select and sorting of the largest keys of a block. The result does not depend on the order of the keys.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../cpu/keys.h"
#include "../common/collectives.cuh"
#include "logits.h"

namespace treedecode::cuda {

inline constexpr int kSharedKeys = 2048;  // keys that are sorted in shared memory; more go to scratch in global memory

constexpr int64_t power_of_two(int64_t n) {
  int64_t size = 1;
  while (size < n) size *= 2;
  return size;
}

template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, const Combine& combine) {
  TD_SHARED(T, warp_values, kLogitsThreads / ptx::kWarpSize);
#pragma unroll
  for (int delta = ptx::kWarpSize / 2; delta > 0; delta /= 2) value = combine(value, ptx::shfl_xor(value, delta));
  if (ptx::lane() == 0) warp_values[ptx::warp()] = value;
  ptx::sync_threads();
  value = warp_values[0];
#pragma unroll
  for (int w = 1; w < kLogitsThreads / ptx::kWarpSize; ++w) value = combine(value, warp_values[w]);
  ptx::sync_threads();  // the next reduction writes warp_values
  return value;
}
template <typename T>
__device__ __forceinline__ T block_max(T value) {
  return block_reduce(value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  return block_reduce(value, [](T a, T b) { return a + b; });
}

// The digit that the k-th largest key has.
struct ChosenDigit {
  int digit;
  int num_above;  // keys with a larger one
  int count;      // keys with this one
};

// Returns the k-th largest key, equal ones counted: at least k keys reach it, and exactly k where all differ.
// each(visit) visits a thread's own keys, the same ones each time; the block has at least k of them, k > 0.
template <typename Key, typename Each>
__device__ __forceinline__ Key kth_largest(const Each& each, int k) {
  constexpr int kBits = 8 * sizeof(Key), kDigits = 256;
  static_assert(kDigits == kLogitsThreads);
  TD_SHARED(uint32_t, histogram, kDigits);
  TD_SHARED(ChosenDigit, chosen, 1);
  Key set_in_any = 0, set_in_all = static_cast<Key>(~Key{0});
  each([&](Key key) {
    set_in_any |= key;
    set_in_all &= key;
  });
  set_in_any = block_reduce(set_in_any, [](Key a, Key b) { return a | b; });
  set_in_all = block_reduce(set_in_all, [](Key a, Key b) { return a & b; });
  // Digits begin at the highest bit in which keys differ: those above would send all keys to one counter.
  int shift = set_in_any == set_in_all ? 0 : kBits - ptx::clz(static_cast<Key>(set_in_any ^ set_in_all));
  Key prefix = shift == kBits ? Key{0} : static_cast<Key>(set_in_all >> shift << shift);
  while (shift > 0) {
    const int width = shift < 8 ? shift : 8;
    shift -= width;
    const Key digits = (Key{1} << width) - 1;
    histogram[ptx::thread()] = 0;
    ptx::sync_threads();
    each([&](Key key) {
      if ((key ^ prefix) >> shift >> width == 0) ptx::atomic_add(&histogram[(key >> shift) & digits], 1u);
    });
    ptx::sync_threads();
    const int digit = kDigits - 1 - ptx::thread();
    const int count = static_cast<int>(histogram[digit]);
    const BlockScan<int> above = block_scan(count);
    if (above.before < k && k <= above.before + count) {
      chosen[0] = {.digit = digit, .num_above = above.before, .count = count};
    }
    ptx::sync_threads();
    prefix |= static_cast<Key>(chosen[0].digit) << shift;
    k -= chosen[0].num_above;
    if (k == chosen[0].count) break;  // all keys with this prefix are among the k largest
  }
  return prefix;
}

// Sorts keys [power_of_two(n)] in shared or global memory, all of them different.
__device__ inline void sort_descending(uint64_t* keys, int n) {
  if (n <= kLogitsThreads) {  // a key's rank is the number of larger ones
    const bool has_key = ptx::thread() < n;
    const uint64_t key = has_key ? keys[ptx::thread()] : 0;
    int rank = 0;
    for (int i = 0; i < n; ++i) rank += keys[i] > key;
    ptx::sync_threads();
    if (has_key) keys[rank] = key;
    ptx::sync_threads();
    return;
  }
  const int size = static_cast<int>(power_of_two(n));
  for (int i = n + ptx::thread(); i < size; i += kLogitsThreads) keys[i] = 0;
  ptx::sync_threads();
  for (int len = 2; len <= size; len *= 2) {
    for (int stride = len / 2; stride > 0; stride /= 2) {
      for (int i = ptx::thread(); i < size / 2; i += kLogitsThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a < b) == ((low & len) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      ptx::sync_threads();
    }
  }
}

// Writes the k best of the `num` keys load(i), 0 = absent, to best [power_of_two(min(k, num))], sorted. Returns how
// many keys there are. All threads may read `best` afterwards.
template <typename Load>
__device__ __forceinline__ int best_sorted(const Load& load, int64_t num, int k, uint64_t* best) {
  const auto each = [&](const auto& visit) {
    for (int64_t i = ptx::thread(); i < num; i += kLogitsThreads) {
      if (const uint64_t key = load(i)) visit(key);
    }
  };
  int count = 0;
  each([&](uint64_t) { ++count; });
  BlockScan<int> scan = block_scan(count);
  const int total = scan.total;
  uint64_t min_key = 0;
  if (total > k) {
    min_key = kth_largest<uint64_t>(each, k);
    count = 0;
    each([&](uint64_t key) { count += key >= min_key; });
    scan = block_scan(count);
  }
  each([&](uint64_t key) {
    if (key >= min_key) best[scan.before++] = key;
  });
  ptx::sync_threads();
  sort_descending(best, total < k ? total : k);
  return total;
}

// Returns true in all threads of the block that calls it last of `num` blocks. That block sees what the others wrote.
__device__ inline bool is_last_block(int32_t* tickets, int64_t num) {
  TD_SHARED(int32_t, last, 1);
  ptx::sync_threads();
  if (ptx::thread() == 0) {
    ptx::thread_fence();
    last[0] = ptx::atomic_add(tickets, 1) == num - 1;
    ptx::thread_fence();
  }
  ptx::sync_threads();
  return last[0] != 0;
}

}  // namespace treedecode::cuda
