#include "merge_states.h"

#include <cmath>

#include "vec.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr int64_t kDims = 256;  // a block of head_dim, so that the sums stay on the stack

// Merges the parts of one state for num_heads heads, in order. Lanes are heads while the weights are computed, and
// dimensions while they are applied. Per head: m is the maximum of the parts' lse, l the sum of weights exp(lse - m),
// acc that of weight * part_out.
template <typename T>
void merge_heads(const MergeStatesParams& p, int64_t state, int64_t head_begin, int num_heads) {
  const int64_t begin = p.merge_indptr[state];
  const int64_t end = p.merge_indptr[state + 1];
  const Vec none = Vec::set(-std::numeric_limits<float>::infinity());
  const float* part_lse = p.part_lse + head_begin;
  const T* part_out = static_cast<const T*>(p.part_out) + head_begin * p.part_stride.head;
  T* out = static_cast<T*>(p.out) + (state * p.num_heads + head_begin) * p.head_dim;

  Vec m = none;
  for (int64_t i = begin; i < end; ++i) m = max(m, Vec::load_n(part_lse + i * p.num_heads, num_heads));
  // If no part has a key, (-inf) - (-inf) would be NaN.
  const Vec base = select(m > none, m, Vec::zero());

  alignas(64) float weight[Vec::N];
  alignas(64) float l[Vec::N];
  alignas(64) float acc[Vec::N * kDims];  // [num_heads, dims]
  for (int64_t dim_begin = 0; dim_begin < p.head_dim || dim_begin == 0; dim_begin += kDims) {
    const int64_t dims = p.head_dim - dim_begin < kDims ? p.head_dim - dim_begin : kDims;
    for (int64_t i = 0; i < num_heads * dims; ++i) acc[i] = 0.0f;
    Vec weight_sum = Vec::zero();
    for (int64_t i = begin; i < end; ++i) {
      const Vec w = exp(Vec::load_n(part_lse + i * p.num_heads, num_heads) - base);
      weight_sum += w;
      w.store(weight);
      for (int h = 0; h < num_heads; ++h) {
        if (weight[h] == 0.0f) continue;  // its output may be anything, also NaN
        const T* x = part_out + i * p.part_stride.token + h * p.part_stride.head + dim_begin;
        float* y = acc + h * dims;
        const Vec scale = Vec::set(weight[h]);
        int64_t d = 0;
        for (; d + Vec::N <= dims; d += Vec::N) fma(scale, Vec::load(x + d), Vec::load(y + d)).store(y + d);
        if (d < dims) {
          const int n = static_cast<int>(dims - d);
          fma(scale, Vec::load_n(x + d, n), Vec::load_n(y + d, n)).store_n(y + d, n);
        }
      }
    }
    weight_sum.store(l);
    for (int h = 0; h < num_heads; ++h) {
      const Vec scale = Vec::set(l[h] == 0.0f ? 0.0f : 1.0f / l[h]);
      const float* y = acc + h * dims;
      T* z = out + h * p.head_dim + dim_begin;
      for (int64_t d = 0; d < dims; d += Vec::N) {
        const int n = dims - d < Vec::N ? static_cast<int>(dims - d) : Vec::N;
        (Vec::load_n(y + d, n) * scale).store_n(z + d, n);
      }
    }
  }
  base.store(weight);
  float* lse = p.lse + state * p.num_heads + head_begin;
  for (int h = 0; h < num_heads; ++h) lse[h] = weight[h] + std::log(l[h]);  // log(0) = -inf
}

template <typename T>
void merge(const MergeStatesParams& p, int64_t state_begin, int64_t state_end) {
  for (int64_t state = state_begin; state < state_end; ++state) {
    for (int64_t h = 0; h < p.num_heads; h += Vec::N) {
      merge_heads<T>(p, state, h, p.num_heads - h < Vec::N ? static_cast<int>(p.num_heads - h) : Vec::N);
    }
  }
}

}  // namespace

void merge_states(const MergeStatesParams& p, int64_t state_begin, int64_t state_end) {
  switch (p.dtype) {
    case DType::F32: return merge<float>(p, state_begin, state_end);
    case DType::BF16: return merge<bf16>(p, state_begin, state_end);
    case DType::F16: return merge<fp16>(p, state_begin, state_end);
  }
}

}  // namespace treedecode::cpu::TD_ISA
