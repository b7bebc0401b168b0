#pragma once

#include "beam_prune.h"
#include "chunk_sums.cuh"

namespace treedecode::cuda {

// Fills the outputs of groups with those of an empty group, or of an invalid one. The last row of a valid group
// overwrites them.
__device__ inline void prepare_groups(const BeamPruneParams& p) {
  if (ptx::block_x() >= p.num_groups) return;
  const bool offsets_fit = p.group_indptr[0] == 0 && p.group_indptr[p.num_groups] == p.logits.rows;
  for (int64_t g = ptx::block_x(); g < p.num_groups; g += ptx::grid_x()) {
    const float score = offsets_fit && p.group_indptr[g] == p.group_indptr[g + 1] ? -kInf : NAN;
    if (ptx::thread() == 0) p.tickets[g] = 0;
    for (int64_t i = g * p.k + ptx::thread(); i < (g + 1) * p.k; i += kLogitsThreads) {
      p.scores[i] = score;
      p.parent[i] = -1;
      p.token[i] = -1;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kLogitsThreads, 2)
    _beam_prune_scan_kernel(const __grid_constant__ BeamPruneParams p) {
  ptx::launch_next_kernel();  // the merge, which waits for the results
  const uint32_t item = ptx::block_x(), row_index = item / p.logits.num_chunks;
  if (row_index >= p.logits.rows) return prepare_groups(p);
  const Row<T> row(p.logits, row_index);
  Chunk<T> chunk(row, static_cast<int64_t>(item % p.logits.num_chunks) * p.logits.chunk_len, p.logits.chunk_len);
  prepare_groups(p);  // while the chunk is being loaded
  float max_logit = -kInf, sum = 0.0f;
  if (p.is_logprobs) {
    // No sum of exponentials is computed that NaN and +inf would show in.
    bool bad = false;
    chunk.each([&](float x, uint32_t) { bad |= !(x < kInf); });
    sum = ptx::sync_threads_or(bad) ? NAN : 0.0f;
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) max_logit = fmaxf(max_logit, chunk.max_of(j));
    chunk.end_pass();
    max_logit = block_max(max_logit);
    const float base = base_of(max_logit);
    chunk.each([&](float x, uint32_t) { sum += ptx::exp2_approx((x - base) * kLog2E); });
    sum = block_sum(sum);
  }
  if (ptx::thread() == 0) p.chunk_sums[item] = {.max = max_logit, .sum = sum};
  chunk.end_pass();
  chunk.apply_mask(row);
  emit_best(chunk, static_cast<int>(p.row_k), p.chunk_keys + item * p.slot_len, static_cast<int>(p.slot_len));
}

// Returns the log-sum-exp of a row, NaN when one of its chunks holds a bad logit. The whole warp calls it.
__device__ inline double row_lse(const BeamPruneParams& p, int64_t row) {
  const int64_t chunks = p.logits.num_chunks;
  const BeamPruneChunkSums* sums = p.chunk_sums + row * chunks;  // [chunks]
  float row_max = -kInf;
  for (int64_t c = ptx::lane(); c < chunks; c += ptx::kWarpSize) row_max = fmaxf(row_max, sums[c].max);
  const float base = base_of(warp_max(row_max));
  double sum = 0.0;
  for (int64_t c = ptx::lane(); c < chunks; c += ptx::kWarpSize) {
    sum += static_cast<double>(sums[c].sum * ptx::exp2_approx((sums[c].max - base) * kLog2E));
  }
  sum = warp_sum(sum);
  if (p.is_logprobs) return sum == sum ? 0.0 : sum;
  return base + log(sum);
}

// Returns the group that a row belongs to; -1 = none, or one too large for ranks of 32 bits. The whole block calls it.
__device__ inline int64_t group_of(const BeamPruneParams& p, int64_t row) {
  if (p.group_indptr[0] != 0 || p.group_indptr[p.num_groups] != p.logits.rows) return -1;
  int64_t first = 0, num = p.num_groups;  // the last group that begins at or before the row is among these
  while (num > 1) {
    const int64_t step = (num + kLogitsThreads - 1) / kLogitsThreads, probe = ptx::thread() * step;
    const int64_t num_begun = block_sum<int64_t>(probe < num && p.group_indptr[first + probe] <= row);
    if (num_begun == 0) return -1;
    first += (num_begun - 1) * step;
    num = num - (num_begun - 1) * step < step ? num - (num_begun - 1) * step : step;
  }
  if (num == 0) return -1;
  const int64_t begin = p.group_indptr[first], end = p.group_indptr[first + 1];
  return begin >= 0 && begin <= row && row < end && end <= p.logits.rows && (end - begin) * p.row_k <= INT32_MAX ? first
                                                                                                                 : -1;
}

__device__ inline void merge_group(const BeamPruneParams& p, int64_t group, uint64_t* shared_keys) {
  const int64_t first = p.group_indptr[group], last = p.group_indptr[group + 1];
  bool bad = false;
  for (int64_t row = first + ptx::thread(); row < last; row += kLogitsThreads) {
    bad |= p.lse[row] != p.lse[row] || !(p.cum_logprobs[row] < kInf);
  }
  if (ptx::sync_threads_or(bad)) return;
  const uint64_t* keys = p.row_keys + first * p.row_k;
  uint64_t* best = p.group_sort_len ? p.group_sort + group * p.group_sort_len : shared_keys;
  const int n = best_sorted([&](int64_t i) { return keys[i]; }, (last - first) * p.row_k, static_cast<int>(p.k), best);
  for (int64_t j = ptx::thread(); j < p.k; j += kLogitsThreads) {
    const int64_t out = group * p.k + j;
    const uint32_t rank = j < n ? key_index(best[j]) : 0;
    p.scores[out] = j < n ? key_value(best[j]) : -kInf;
    p.parent[out] = j < n ? static_cast<int32_t>(first + rank / static_cast<uint32_t>(p.row_k)) : -1;
    p.token[out] = j < n ? p.row_tokens[first * p.row_k + rank] : -1;
  }
}

__global__ void __launch_bounds__(kLogitsThreads, 2)
    _beam_prune_merge_kernel(const __grid_constant__ BeamPruneParams p) {
  ptx::wait_for_previous_kernel();
  TD_SHARED(uint64_t, shared_keys, kSharedKeys);
  TD_SHARED(double, lse, 1);
  const int64_t row = ptx::block_x();
  if (ptx::warp() == 0) {
    const double value = row_lse(p, row);
    if (ptx::lane() == 0) {
      lse[0] = value;  // read after the barriers of best_sorted
      p.lse[row] = static_cast<float>(value);
    }
  }
  const int64_t group = group_of(p, row);
  if (group < 0) return;
  const int64_t first = p.group_indptr[group];
  const double cum = p.cum_logprobs[row];
  const int64_t num = p.logits.num_chunks * p.slot_len;
  const uint64_t* keys = p.chunk_keys + row * num;
  uint64_t* best = p.row_sort_len ? p.row_sort + row * p.row_sort_len : shared_keys;
  const int n = best_sorted([&](int64_t i) { return keys[i]; }, num, static_cast<int>(p.row_k), best);
  for (int64_t j = ptx::thread(); j < p.row_k; j += kLogitsThreads) {
    uint64_t key = 0;
    if (j < n) {
      const float score = static_cast<float>(cum + (static_cast<double>(key_value(best[j])) - lse[0]));
      if (score > -kInf) key = make_key(score, static_cast<uint32_t>((row - first) * p.row_k + j));
      p.row_tokens[row * p.row_k + j] = static_cast<int32_t>(key_index(best[j]));
    }
    p.row_keys[row * p.row_k + j] = key;
  }
  if (is_last_block(p.tickets + group, p.group_indptr[group + 1] - first)) merge_group(p, group, shared_keys);
}

}  // namespace treedecode::cuda
