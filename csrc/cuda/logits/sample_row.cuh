// sample's parts: a row's settings and sums, and the draw from a chunk.
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

// Of a row, relative to its maximum.
struct RowSums {
  float top;
  double sum, log_sum, mass;  // of exp(x - top), of exp(x - top) * (x - top), of exp((x - top) / temperature)
};

// The same in all lanes of the warp that calls it.
__device__ inline RowSums row_sums(const SampleParams& p, int64_t row, float scale) {
  const SampleChunkSums* chunks = p.chunk_sums + row * p.logits.num_chunks;  // [num_chunks]
  RowSums out{-kInf, 0, 0, 0};
  for (uint32_t c = ptx::lane(); c < p.logits.num_chunks; c += ptx::kWarpSize) out.top = fmaxf(out.top, chunks[c].top);
  out.top = warp_max(out.top);
  for (uint32_t c = ptx::lane(); c < p.logits.num_chunks; c += ptx::kWarpSize) {
    const float down = chunks[c].top == -kInf ? 0.0f : chunks[c].top - out.top;
    const double factor = ptx::exp2_approx(down * kLog2E), sum = chunks[c].sum;
    out.sum += factor * sum;
    // A chunk so far down that its factor is 0 may be infinitely far down.
    if (factor > 0 || factor != factor) out.log_sum += factor * (chunks[c].log_sum * kLn2 + sum * down);
    out.mass += static_cast<double>(ptx::exp2_approx(down * scale)) * chunks[c].mass;
  }
  out.sum = warp_sum(out.sum);
  out.log_sum = warp_sum(out.log_sum);
  out.mass = warp_sum(out.mass);
  return out;
}

// Draws from tokens whose key is at least `least`, in token order: the first at which the sum of their weights
// exp((x - top) / temperature) exceeds `target`, or the last one with a weight. All threads get the token.
template <typename T>
__device__ __forceinline__ int64_t draw_from(Chunk<T>& chunk, float top, float scale, uint64_t least, double target) {
  constexpr int N = kPerVector<T>, kWarps = kLogitsThreads / ptx::kWarpSize;
  TD_SHARED(float, parts, kVectors* kWarps);  // in token order
  TD_SHARED(int64_t, drawn, 1);
  const auto weight = [&](float x, uint32_t token) {
    return make_key(x, token) >= least ? ptx::exp2_approx((x - top) * scale) : 0.0f;
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
    // A bit for the vector: from an equality of numbers the compiler would make an index, and of registers local
    // memory.
    const uint32_t bit = 1u << (part / kWarps);
    ptx::Bytes16 v{};
    float mine = 0.0f;
    uint32_t token = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!(bit >> j & 1)) continue;
      v = chunk.vector[j];
      mine = weights[j];
      token = chunk.token(j);
    }
    const float up_to_here = warp_scan(mine);
    const uint32_t above = ptx::ballot(before + up_to_here > target), some = ptx::ballot(mine > 0);
    // Sums in another order may round to less than the target that lies just below them.
    const int lane = above & some ? ptx::lowest_bit(above & some) : 31 - ptx::clz(some);
    if (ptx::lane() == lane) {
      double cum = before + (up_to_here - mine);
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
