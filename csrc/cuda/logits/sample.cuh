#pragma once

#include "sample_filter.cuh"

namespace treedecode::cuda {

template <typename T>
__global__ void __launch_bounds__(kLogitsThreads, 2) _sample_scan_kernel(const __grid_constant__ SampleParams p) {
  ptx::launch_next_kernel();  // the draw, which waits for the results
  const uint32_t item = ptx::block_x(), row_index = item / p.logits.num_chunks;
  const Row<T> row(p.logits, row_index);
  Chunk<T> chunk(row, static_cast<int64_t>(item % p.logits.num_chunks) * p.logits.chunk_len, p.logits.chunk_len);
  const SampleSettings s(p, row_index);  // while the chunk is being loaded
  if (!s.valid()) return;
  chunk.apply_mask(row);
  float thread_max = -kInf;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) thread_max = fmaxf(thread_max, chunk.max_of(j));
  chunk.end_pass();
  const float max_logit = block_max(thread_max), base = base_of(max_logit);
  float sum = 0.0f, log_sum = 0.0f;
  chunk.each([&](float x, uint32_t) {
    float t = (x - base) * kLog2E;
    t = t < -200.0f ? -200.0f : t;  // 0 * -inf would be NaN, and NaN stays
    const float w = ptx::exp2_approx(t);
    sum += w;
    log_sum = ptx::fma(w, t, log_sum);
  });
  chunk.end_pass();
  sum = block_sum(sum);
  log_sum = block_sum(log_sum);
  float mass = sum;
  const float scale = s.scale();
  if (scale != kLog2E) {
    mass = 0.0f;
    chunk.each([&](float x, uint32_t) { mass += ptx::exp2_approx((x - base) * scale); });
    mass = block_sum(mass);
    chunk.end_pass();
  }
  if (ptx::thread() == 0) p.chunk_sums[item] = {.max = max_logit, .sum = sum, .log_sum = log_sum, .mass = mass};
  uint64_t* slot = p.chunk_keys + int64_t{item} * kSampleSlot;
  if (s.greedy()) {
    uint64_t best = 0;
    if (thread_max == max_logit) {
      chunk.each([&](float x, uint32_t token) {
        const uint64_t key = x == max_logit ? make_key(x, token) : 0;
        best = key > best ? key : best;
      });
    }
    best = block_max(best);
    if (ptx::thread() == 0) slot[0] = best;
  } else if (s.filters()) {
    const uint64_t min_key = emit_best(chunk, kSampleBest, slot, kSampleSlot);
    if (ptx::thread() == 0) p.chunk_min_key[item] = min_key;
  }
}

template <typename T>
__device__ __forceinline__ int64_t draw_unfiltered(const SampleParams& p, const Row<T>& row, const SampleSettings& s,
                                                   const RowSums& sums, const SampleChunkSums* chunk_sums) {
  const float scale = s.scale();
  const double target = s.uniform * sums.mass;
  double cum = 0, before = 0;
  uint32_t chosen = 0;
  for (uint32_t c = 0; c < p.logits.num_chunks; ++c) {
    const float chunk_max = chunk_sums[c].max;
    if (chunk_max == -kInf) continue;
    const double mass = static_cast<double>(ptx::exp2_approx((chunk_max - sums.max) * scale)) * chunk_sums[c].mass;
    if (!(mass > 0)) continue;
    chosen = c;
    before = cum;
    cum += mass;
    if (cum > target) break;
  }
  Chunk<T> chunk(row, static_cast<int64_t>(chosen) * p.logits.chunk_len, p.logits.chunk_len);
  chunk.apply_mask(row);
  return draw_from(chunk, sums.max, scale, 0, target - before);
}

template <typename T>
__device__ __forceinline__ int64_t draw_filtered(const SampleParams& p, const Row<T>& row, int64_t row_index,
                                                 const SampleSettings& s, const RowSums& sums) {
  TD_SHARED(uint64_t, keys, kSharedKeys);
  const int64_t first = row_index * p.logits.num_chunks, num = int64_t{p.logits.num_chunks} * kSampleSlot;
  const uint64_t* all = p.chunk_keys + first * kSampleSlot;
  uint64_t complete_from = 0;  // keys has all tokens of the row from this key on
  for (int64_t c = ptx::thread(); c < p.logits.num_chunks; c += kLogitsThreads) {
    const uint64_t min_key = p.chunk_min_key[first + c];
    complete_from = min_key > complete_from ? min_key : complete_from;
  }
  complete_from = block_max(complete_from);
  // Few tokens decide as a rule, and few are sorted quickly.
  for (int limit = kLogitsThreads; limit <= kSharedKeys; limit *= kSharedKeys / kLogitsThreads) {
    const int total = best_sorted([&](int64_t i) { return all[i]; }, num, limit, keys);
    const int n = total < limit ? total : limit;
    int num_complete = 0;
    for (int i = ptx::thread(); i < n; i += kLogitsThreads) num_complete += keys[i] >= complete_from;
    num_complete = block_sum(num_complete);
    const int64_t token = draw_from_best(s, sums, keys, n, num_complete, complete_from == 0 && total <= limit);
    if (token >= 0) return token;
    if (total <= limit) break;
  }
  return RowSearch<T>{row, s, sums}.draw(p.logits);
}

template <typename T>
__global__ void __launch_bounds__(kLogitsThreads, 2) _sample_draw_kernel(const __grid_constant__ SampleParams p) {
  ptx::wait_for_previous_kernel();
  TD_SHARED(RowSums, shared_sums, 1);
  const int64_t row_index = ptx::block_x();
  const SampleSettings s(p, row_index);
  const bool valid = s.valid();
  if (valid && ptx::warp() == 0) {
    const RowSums sums = row_sums(p, row_index, s.scale());
    if (ptx::lane() == 0) shared_sums[0] = sums;
  }
  ptx::sync_threads();
  if (!valid || !(shared_sums[0].sum > 0)) {  // NaN, +inf, or no token
    if (ptx::thread() == 0) {
      p.token[row_index] = -1;
      p.logprob[row_index] = NAN;
      p.entropy[row_index] = NAN;
    }
    return;
  }
  const RowSums& sums = shared_sums[0];
  const Row<T> row(p.logits, row_index);
  int64_t token = -1;
  if (s.greedy()) {
    uint64_t best = 0;
    for (int64_t c = ptx::thread(); c < p.logits.num_chunks; c += kLogitsThreads) {
      const uint64_t key = p.chunk_keys[(row_index * p.logits.num_chunks + c) * kSampleSlot];
      best = key > best ? key : best;
    }
    token = key_index(block_max(best));
  } else if (s.filters()) {
    token = draw_filtered(p, row, row_index, s, sums);
  } else {
    token = draw_unfiltered(p, row, s, sums, p.chunk_sums + row_index * p.logits.num_chunks);
  }
  if (ptx::thread() == 0) {
    const double log_sum = log(sums.sum);
    const double nats = log_sum - sums.log_sum / sums.sum;
    p.token[row_index] = static_cast<int32_t>(token);
    p.logprob[row_index] = static_cast<float>(static_cast<double>(ptx::to_float(row.x[token])) - sums.max - log_sum);
    p.entropy[row_index] = nats > 0 ? static_cast<float>(nats) : 0.0f;
  }
}

}  // namespace treedecode::cuda
