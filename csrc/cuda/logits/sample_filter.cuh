// Where the filters of sample cut a row's ranking: tokens whose key is at least the border's are kept.
#pragma once

#include "sample_row.cuh"

namespace treedecode::cuda {

// The least logit that min_p keeps: in fp32, rounded towards what is kept by the exact bound.
__device__ inline float least_by_min_p(const SampleSettings& s, float top) {
  if (s.min_p == 0) return -kInf;
  const double bound = top + static_cast<double>(s.temperature) * log(static_cast<double>(s.min_p));
  const float least = static_cast<float>(bound);
  return static_cast<double>(least) < bound ? from_ordered_bits(ordered_bits(least) + 1) : least;
}

// Draws among the `n` best tokens of the row, ranked in keys [kSharedKeys], of which the first `complete` have no
// better token left out; `whole` = the row has no others. Returns -1 where the border is not among the complete ones.
__device__ __forceinline__ int64_t draw_from_best(const SampleSettings& s, const RowSums& row, uint64_t* keys, int n,
                                                  int complete, bool whole) {
  TD_SHARED(double, before, kSharedKeys);  // weight of the better tokens
  TD_SHARED(int, num_kept, 1);
  TD_SHARED(int, drawn, 1);  // rank in token order
  const float scale = s.scale(), least = least_by_min_p(s, row.top);
  const int each = (n + kLogitsThreads - 1) / kLogitsThreads;
  const int begin = ptx::thread() * each, end = begin + each < n ? begin + each : n;
  const auto weight = [&](float x) { return static_cast<double>(ptx::exp2_approx((x - row.top) * scale)); };
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
  if (ptx::thread() == 0) {  // sum_up's barriers lie before the first use of either
    num_kept[0] = n;
    drawn[0] = 0;
  }
  const double total = sum_up([&](int i) { return key_value(keys[i]); });
  const auto up_to = [&](int i) { return i < n ? before[i] : total; };
  if (s.top_k > complete && !whole) return -1;
  const double target = s.top_p * (s.top_k > 0 ? up_to(s.top_k < n ? s.top_k : n) : row.mass);
  const auto beyond = [&](int i) { return (s.top_k > 0 && i >= s.top_k) || (s.top_p < 1 && up_to(i) >= target); };
  int mine = n;
  for (int i = end - 1; i >= begin; --i) {
    if (i > 0 && i < complete && (beyond(i) || key_value(keys[i]) < least)) mine = i;
  }
  if (mine < n) ptx::atomic_min(num_kept, mine);
  ptx::sync_threads();
  int kept = num_kept[0];
  if (kept == n && !whole) {
    if (!beyond(complete)) return -1;
    kept = complete;
  }
  // Into token order: the token in the upper half of the key, and the logit below.
  for (int i = ptx::thread(); i < kept; i += kLogitsThreads) keys[i] = keys[i] << 32 | keys[i] >> 32;
  ptx::sync_threads();
  sort_descending(keys, kept);
  const auto value_of = [&](int i) { return i < kept ? from_ordered_bits(static_cast<uint32_t>(keys[i])) : -kInf; };
  const double bound = s.uniform * sum_up(value_of);
  for (int i = begin; i < end; ++i) {
    // The last token with a weight that begins at or below the bound.
    if (i < kept && before[i] <= bound && weight(value_of(i)) > 0) ptx::atomic_max(drawn, i);
  }
  ptx::sync_threads();
  return 0xffffffff - static_cast<int64_t>(keys[drawn[0]] >> 32);
}

// The search of a whole row, which the cache holds.
template <typename T>
struct RowSearch {
  const Row<T>& row;
  const SampleSettings& s;
  const RowSums& sums;

  // visit(x, token) for all tokens above -inf.
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
  __device__ __forceinline__ float weight(float x) const { return ptx::exp2_approx((x - sums.top) * s.scale()); }

  // The key of the worst token that top_k keeps.
  __device__ __forceinline__ uint64_t by_top_k() const {
    int count = 0;
    each([&](float, uint32_t) { ++count; });
    if (s.top_k >= block_sum(count)) return 0;
    return kth_largest<uint64_t>(
        [&](const auto& visit) { each([&](float x, uint32_t token) { visit(make_key(x, token)); }); }, s.top_k);
  }

  // The key of the worst token that top_p keeps of those from `least` on: first its logit, then its rank among equals.
  __device__ __forceinline__ uint64_t by_top_p(uint64_t least) const {
    constexpr int kSplits = 7;
    double mass = sums.mass;
    if (least > 0) {
      mass = 0;
      each([&](float x, uint32_t token) { mass += make_key(x, token) >= least ? weight(x) : 0.0f; });
      mass = block_sum(mass);
    }
    const double target = s.top_p * mass;
    // Tokens from `low` on hold the target, those from `high` on do not.
    uint32_t low = ordered_bits(-kInf) + 1, high = ordered_bits(sums.top) + 1;
    double above = 0;  // what tokens from `high` on hold
    while (high - low > 1) {
      const uint32_t step = high - low > kSplits ? (high - low + kSplits) / (kSplits + 1) : 1;
      double held[kSplits] = {};
      each([&](float x, uint32_t token) {
        const uint32_t bits = ordered_bits(x);
        if (bits < low || bits >= high || make_key(x, token) < least) return;
        const double w = weight(x);
#pragma unroll
        for (int j = 0; j < kSplits; ++j) held[j] += bits - low >= step * (j + 1) ? w : 0.0;
      });
      uint32_t next_low = low, next_high = high;
      double next_above = above;
#pragma unroll
      for (int j = 0; j < kSplits; ++j) {
        const uint32_t split = low + step * (j + 1);
        const double from_split = above + block_sum(held[j]);
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
    const float border = from_ordered_bits(low);
    int count = 0;
    each([&](float x, uint32_t token) { count += ordered_bits(x) == low && make_key(x, token) >= least; });
    count = block_sum(count);
    if (count == 0) return least;  // top_p is so near 1 that rounding has eaten the rest
    const double wanted = ceil((target - above) / weight(border));
    const int ties = wanted >= 1 ? (wanted < count ? static_cast<int>(wanted) : count) : 1;
    return kth_largest<uint64_t>(
        [&](const auto& visit) {
          each([&](float x, uint32_t token) {
            if (ordered_bits(x) == low && make_key(x, token) >= least) visit(make_key(x, token));
          });
        },
        ties);
  }

  __device__ __forceinline__ uint64_t border() const {
    uint64_t least = s.top_k > 0 ? by_top_k() : 0;
    if (s.top_p < 1) least = by_top_p(least);
    const uint64_t by_min_p = static_cast<uint64_t>(ordered_bits(least_by_min_p(s, sums.top))) << 32;
    return s.min_p > 0 && by_min_p > least ? by_min_p : least;
  }

  __device__ __forceinline__ int64_t draw(const LogitsParams& p) const {
    const uint64_t least = border();
    const auto held_by = [&](uint32_t c) {
      Chunk<T> chunk(row, static_cast<int64_t>(c) * p.chunk_len, p.chunk_len);
      chunk.apply_mask(row);
      float sum = 0.0f;
      chunk.each([&](float x, uint32_t token) { sum += make_key(x, token) >= least ? weight(x) : 0.0f; });
      return static_cast<double>(block_sum(sum));
    };
    double total = 0, cum = 0, before = 0;
    for (uint32_t c = 0; c < p.num_chunks; ++c) total += held_by(c);
    const double target = s.uniform * total;
    uint32_t chosen = 0;
    for (uint32_t c = 0; c < p.num_chunks; ++c) {
      const double held = held_by(c);
      if (!(held > 0)) continue;
      chosen = c;
      before = cum;
      cum += held;
      if (cum > target) break;
    }
    Chunk<T> chunk(row, static_cast<int64_t>(chosen) * p.chunk_len, p.chunk_len);
    chunk.apply_mask(row);
    return draw_from(chunk, sums.top, s.scale(), least, target - before);
  }
};

}  // namespace treedecode::cuda
