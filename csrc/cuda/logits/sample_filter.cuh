// Filters of sample: each keeps the tokens of a row from some key on, in the order of their keys.
#pragma once

#include "sample_row.cuh"

namespace treedecode::cuda {

// Returns the smallest logit that min_p keeps: the smallest fp32 number that reaches the exact bound.
__device__ inline float min_p_threshold(const SampleSettings& s, float max_logit) {
  if (s.min_p == 0) return -kInf;
  const double bound = max_logit + static_cast<double>(s.temperature) * log(static_cast<double>(s.min_p));
  const float rounded = static_cast<float>(bound);
  return static_cast<double>(rounded) < bound ? from_ordered_bits(ordered_bits(rounded) + 1) : rounded;
}

// Draws among the `n` best tokens of the row, in the order of their keys [kSharedKeys]. No token of the row is missing
// among the first `num_complete`, and none at all if `whole`. Returns -1 if the last token to keep is not among these.
__device__ __forceinline__ int64_t draw_from_best(const SampleSettings& s, const RowSums& row, uint64_t* keys, int n,
                                                  int num_complete, bool whole) {
  TD_SHARED(double, before, kSharedKeys);  // weight of the tokens before
  TD_SHARED(int, shared_num_kept, 1);
  TD_SHARED(int, drawn, 1);  // rank in token order
  const float scale = s.scale(), min_logit = min_p_threshold(s, row.max);
  const int each = (n + kLogitsThreads - 1) / kLogitsThreads;
  const int begin = ptx::thread() * each, end = begin + each < n ? begin + each : n;
  const auto weight = [&](float x) { return static_cast<double>(ptx::exp2_approx((x - row.max) * scale)); };
  const auto sum_up = [&](const auto& value) {
    double sum = 0;
    for (int i = begin; i < end; ++i) sum += weight(value(i));
    const BlockScan<double> scan = block_scan(sum);
    sum = scan.before;
    for (int i = begin; i < end; ++i) {
      before[i] = sum;
      sum += weight(value(i));
    }
    ptx::sync_threads();
    return scan.total;
  };
  if (ptx::thread() == 0) {  // the barriers of sum_up come before the first use of either
    shared_num_kept[0] = n;
    drawn[0] = 0;
  }
  const double total = sum_up([&](int i) { return key_value(keys[i]); });
  const auto up_to = [&](int i) { return i < n ? before[i] : total; };
  if (s.top_k > num_complete && !whole) return -1;
  const double target = s.top_p * (s.top_k > 0 ? up_to(s.top_k < n ? s.top_k : n) : row.mass);
  const auto beyond = [&](int i) { return (s.top_k > 0 && i >= s.top_k) || (s.top_p < 1 && up_to(i) >= target); };
  int first_beyond = n;  // of this thread
  for (int i = end - 1; i >= begin; --i) {
    if (i > 0 && i < num_complete && (beyond(i) || key_value(keys[i]) < min_logit)) first_beyond = i;
  }
  if (first_beyond < n) ptx::atomic_min(shared_num_kept, first_beyond);
  ptx::sync_threads();
  int num_kept = shared_num_kept[0];
  if (num_kept == n && !whole) {
    if (!beyond(num_complete)) return -1;
    num_kept = num_complete;
  }
  // Token order: the token is the upper half of the new key, and the logit the lower one.
  for (int i = ptx::thread(); i < num_kept; i += kLogitsThreads) keys[i] = keys[i] << 32 | keys[i] >> 32;
  ptx::sync_threads();
  sort_descending(keys, num_kept);
  const auto value_of = [&](int i) { return i < num_kept ? from_ordered_bits(static_cast<uint32_t>(keys[i])) : -kInf; };
  const double bound = s.uniform * sum_up(value_of);
  for (int i = begin; i < end; ++i) {
    // The last token with a weight, among those whose weight before is at most the bound.
    if (i < num_kept && before[i] <= bound && weight(value_of(i)) > 0) ptx::atomic_max(drawn, i);
  }
  ptx::sync_threads();
  return 0xffffffff - static_cast<int64_t>(keys[drawn[0]] >> 32);
}

// Filters and draws by several passes over the whole row, which is in the cache.
template <typename T>
struct RowSearch {
  const Row<T>& row;
  const SampleSettings& s;
  const RowSums& sums;

  // Calls visit(x, token) for all tokens above -inf.
  template <typename Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
    constexpr int N = kPerVector<T>;
    for (int64_t i = ptx::thread() * N; i < row.vocab; i += kLogitsThreads * N) {
      const ptx::Bytes16 v = row.load_allowed(i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float x = element<T>(v, e);
        if (x > -kInf) visit(x, static_cast<uint32_t>(i + e));
      }
    }
  }
  __device__ __forceinline__ float weight(float x) const { return ptx::exp2_approx((x - sums.max) * s.scale()); }

  // Returns the smallest key that top_k keeps.
  __device__ __forceinline__ uint64_t top_k_key() const {
    int count = 0;
    each([&](float, uint32_t) { ++count; });
    if (s.top_k >= block_sum(count)) return 0;
    return kth_largest<uint64_t>(
        [&](const auto& visit) { each([&](float x, uint32_t token) { visit(make_key(x, token)); }); }, s.top_k);
  }

  // Returns the smallest key that top_p keeps of those from `min_key` on: first its logit, then its rank among equals.
  __device__ __forceinline__ uint64_t top_p_key(uint64_t min_key) const {
    constexpr int kSplits = 7;
    double mass = sums.mass;
    if (min_key > 0) {
      mass = 0;
      each([&](float x, uint32_t token) { mass += make_key(x, token) >= min_key ? weight(x) : 0.0f; });
      mass = block_sum(mass);
    }
    const double target = s.top_p * mass;
    // The weight of tokens from `low` on reaches the target, that of tokens from `high` on does not.
    uint32_t low = ordered_bits(-kInf) + 1, high = ordered_bits(sums.max) + 1;
    double above = 0;  // weight of tokens from `high` on
    while (high - low > 1) {
      const uint32_t step = high - low > kSplits ? (high - low + kSplits) / (kSplits + 1) : 1;
      double mass_from[kSplits] = {};  // of tokens in [low, high), from each split on
      each([&](float x, uint32_t token) {
        const uint32_t bits = ordered_bits(x);
        if (bits < low || bits >= high || make_key(x, token) < min_key) return;
        const double w = weight(x);
#pragma unroll
        for (int j = 0; j < kSplits; ++j) mass_from[j] += bits - low >= step * (j + 1) ? w : 0.0;
      });
      uint32_t next_low = low, next_high = high;
      double next_above = above;
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
        const uint32_t split = low + step * (j + 1);
        const double from_split = above + block_sum(mass_from[j]);
        if (split >= next_high) continue;  // also once a lower split has failed
        if (from_split >= target) {
          next_low = split;
        } else {
          next_high = split;
          next_above = from_split;
        }
      }
      low = next_low;
      high = next_high;
      above = next_above;
    }
    const float min_logit = from_ordered_bits(low);
    int count = 0;
    each([&](float x, uint32_t token) { count += ordered_bits(x) == low && make_key(x, token) >= min_key; });
    count = block_sum(count);
    if (count == 0) return min_key;  // top_p is so near 1 that, rounded, all tokens are kept
    const double wanted = ceil((target - above) / weight(min_logit));
    const int ties = wanted >= 1 ? (wanted < count ? static_cast<int>(wanted) : count) : 1;
    return kth_largest<uint64_t>(
        [&](const auto& visit) {
          each([&](float x, uint32_t token) {
            if (ordered_bits(x) == low && make_key(x, token) >= min_key) visit(make_key(x, token));
          });
        },
        ties);
  }

  // Returns the smallest key that all filters keep.
  __device__ __forceinline__ uint64_t min_kept_key() const {
    uint64_t min_key = s.top_k > 0 ? top_k_key() : 0;
    if (s.top_p < 1) min_key = top_p_key(min_key);
    const uint64_t min_p_key = static_cast<uint64_t>(ordered_bits(min_p_threshold(s, sums.max))) << 32;
    return s.min_p > 0 && min_p_key > min_key ? min_p_key : min_key;
  }

  __device__ __forceinline__ int64_t draw(const LogitsParams& p) const {
    const uint64_t min_key = min_kept_key();
    const auto mass_of = [&](uint32_t c) {
      Chunk<T> chunk(row, static_cast<int64_t>(c) * p.chunk_len, p.chunk_len);
      chunk.apply_mask(row);
      float sum = 0.0f;
      chunk.each([&](float x, uint32_t token) { sum += make_key(x, token) >= min_key ? weight(x) : 0.0f; });
      return static_cast<double>(block_sum(sum));
    };
    double total = 0, cum = 0, before = 0;
    for (uint32_t c = 0; c < p.num_chunks; ++c) total += mass_of(c);
    const double target = s.uniform * total;
    uint32_t chosen = 0;
    for (uint32_t c = 0; c < p.num_chunks; ++c) {
      const double mass = mass_of(c);
      if (!(mass > 0)) continue;
      chosen = c;
      before = cum;
      cum += mass;
      if (cum > target) break;
    }
    Chunk<T> chunk(row, static_cast<int64_t>(chosen) * p.chunk_len, p.chunk_len);
    chunk.apply_mask(row);
    return draw_from(chunk, sums.max, s.scale(), min_key, target - before);
  }
};

}  // namespace treedecode::cuda
