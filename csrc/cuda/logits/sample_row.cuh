// Parts of sample: the settings and sums of a row, and the draw from a chunk.
#pragma once

#include "../../cpu/philox.h"
#include "chunk_sums.cuh"
#include "sample.h"

namespace treedecode::cuda {

struct SampleSettings {
  float temperature, top_p, min_p;
  int32_t top_k;
  double uniform;

  __device__ SampleSettings(const SampleParams& p, int64_t row)
      : temperature(p.temperature[row * p.strides.temperature]),
        top_p(p.top_p[row * p.strides.top_p]),
        min_p(p.min_p[row * p.strides.min_p]),
        top_k(p.top_k[row * p.strides.top_k]),
        uniform(treedecode::uniform(static_cast<uint64_t>(p.seeds[row * p.strides.seed]),
                                    static_cast<uint64_t>(p.positions[row * p.strides.position]))) {
    if (top_k >= p.logits.vocab) top_k = 0;
  }
  __device__ bool valid() const {
    return temperature >= 0 && temperature < kInf && top_k >= 0 && top_p >= 0 && top_p <= 1 && min_p >= 0 && min_p <= 1;
  }
  __device__ bool greedy() const { return temperature == 0 || top_k == 1; }
  __device__ bool filters() const { return !greedy() && (top_k > 0 || top_p < 1 || min_p > 0); }
  // log2(e) / temperature
  __device__ float scale() const { return kLog2E / (greedy() ? 1.0f : fmaxf(temperature, 1e-30f)); }
};

// Sums of a row, relative to its maximum.
struct RowSums {
  float max;
  double sum, log_sum, mass;  // of exp(x - max), of exp(x - max) * (x - max), of exp((x - max) / temperature)
};

// Adds up the sums of a row's chunks. All lanes of a warp call it and get the same.
__device__ inline RowSums row_sums(const SampleParams& p, int64_t row, float scale) {
  const SampleChunkSums* chunks = p.chunk_sums + row * p.logits.num_chunks;  // [num_chunks]
  RowSums out{-kInf, 0, 0, 0};
  for (uint32_t c = ptx::lane(); c < p.logits.num_chunks; c += ptx::kWarpSize) out.max = fmaxf(out.max, chunks[c].max);
  out.max = warp_max(out.max);
  for (uint32_t c = ptx::lane(); c < p.logits.num_chunks; c += ptx::kWarpSize) {
    const float delta = chunks[c].max == -kInf ? 0.0f : chunks[c].max - out.max;
    const double factor = ptx::exp2_approx(delta * kLog2E), sum = chunks[c].sum;
    out.sum += factor * sum;
    // Where the factor is 0, delta may be -inf, and their product NaN.
    if (factor > 0 || factor != factor) out.log_sum += factor * (chunks[c].log_sum * kLn2 + sum * delta);
    out.mass += static_cast<double>(ptx::exp2_approx(delta * scale)) * chunks[c].mass;
  }
  out.sum = warp_sum(out.sum);
  out.log_sum = warp_sum(out.log_sum);
  out.mass = warp_sum(out.mass);
  return out;
}

// Draws from tokens whose key is at least `min_key`, in token order: the first at which the sum of their weights
// exp((x - max_logit) / temperature) exceeds `target`, or the last one with a weight. All threads get the token.
template <typename T>
__device__ __forceinline__ int64_t draw_from(Chunk<T>& chunk, float max_logit, float scale, uint64_t min_key,
                                             double target) {
  constexpr int N = kPerVector<T>, kWarps = kLogitsThreads / ptx::kWarpSize;
  TD_SHARED(float, parts, kVectors* kWarps);  // in token order
  TD_SHARED(int64_t, drawn, 1);
  const auto weight = [&](float x, uint32_t token) {
    return make_key(x, token) >= min_key ? ptx::exp2_approx((x - max_logit) * scale) : 0.0f;
  };
  float weights[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    weights[j] = 0.0f;
#pragma unroll
    for (int e = 0; e < N; ++e) weights[j] += weight(chunk.value(j, e), chunk.token(j) + e);
    const float part = warp_sum(weights[j]);
    if (ptx::lane() == 0) parts[j * kWarps + ptx::warp()] = part;
  }
  if (ptx::thread() == 0) drawn[0] = -1;
  ptx::sync_threads();
  double before = 0, sum = 0;
  int part = -1;
  for (int i = 0; i < kVectors * kWarps; ++i) {
    if (!(parts[i] > 0)) continue;
    part = i;
    before = sum;
    sum += parts[i];
    if (sum > target) break;
  }
  if (part >= 0 && part % kWarps == ptx::warp()) {
    // A bit tells which vector: from a comparison of numbers the compiler would derive an index, and move the registers
    // to local memory.
    const uint32_t bit = 1u << (part / kWarps);
    ptx::Bytes16 v{};
    float lane_weight = 0.0f;
    uint32_t token = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!(bit >> j & 1)) continue;
      v = chunk.vector[j];
      lane_weight = weights[j];
      token = chunk.token(j);
    }
    const float sum_up_to_lane = warp_scan(lane_weight);
    const uint32_t above = ptx::ballot(before + sum_up_to_lane > target), some = ptx::ballot(lane_weight > 0);
    // Summed in another order, the weights may round to less than a target that is just below their sum.
    const int lane = above & some ? ptx::lowest_bit(above & some) : 31 - ptx::clz(some);
    if (ptx::lane() == lane) {
      double cum = before + (sum_up_to_lane - lane_weight);
      int64_t best = -1;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float w = weight(element<T>(v, e), token + e);
        if (w > 0 && !(best >= 0 && cum > target)) {
          best = token + e;
          cum += w;
        }
      }
      drawn[0] = best;
    }
  }
  ptx::sync_threads();
  return drawn[0];
}

}  // namespace treedecode::cuda
