// The second launch of tree_attention: partial results of a query token, merged along its branch's path.
#pragma once

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kMergeLoads = 8;  // of a lane, under way at once

// Dimensions that a warp holds in one quad of each lane.
inline constexpr int64_t kQuadDims = 4 * ptx::kWarpSize;

// A warp takes a query token and head, up to kMergeQuads * kQuadDims dimensions. Parts are added in the order of the
// path.
template <typename T, int kMergeQuads>
__global__ void __launch_bounds__(kAttentionThreads)
    _tree_attention_merge_kernel(const __grid_constant__ TreeAttentionParams p) {
  ptx::wait_for_previous_kernel();
  constexpr int kWarps = kAttentionThreads / ptx::kWarpSize, kMergeParts = kMergeLoads / kMergeQuads;
  const int64_t at = static_cast<int64_t>(ptx::block_x()) * kWarps + ptx::warp();
  if (at >= p.num_q * p.num_qo_heads) return;
  const int token = static_cast<int>(at / p.num_qo_heads), head = static_cast<int>(at % p.num_qo_heads);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  int first_part = 0, num_parts = 0;
  const bool fits = plan_fits(p);
  const bool idle = token >= p.q_indptr[p.num_rows];  // belongs to no branch
  if (fits && !idle) {
    const int b = warp_search(static_cast<int>(p.num_rows), token, [&](int i) { return p.q_indptr[i]; });
    const int first = p.q_indptr[b], q_len = p.q_indptr[b + 1] - first;
    num_parts = (p.part_indptr[b + 1] - p.part_indptr[b]) / q_len;
    first_part = p.part_indptr[b] + (token - first) * num_parts;
    if (num_parts == 1) return;  // already final
  }
  const auto lse_of = [&](int i) { return p.part_lse[(first_part + static_cast<int64_t>(i)) * p.num_qo_heads + head]; };
  const auto dim_of = [](int quad) { return 4 * (quad * ptx::kWarpSize + ptx::lane()); };
  const float sink = p.sinks && !idle ? p.sinks[head] : kNone;
  float top = kNone;
  bool is_nan = !fits;  // a maximum would lose it
  for (int i = ptx::lane(); i < num_parts; i += ptx::kWarpSize) {
    top = fmaxf(top, lse_of(i));
    is_nan |= lse_of(i) != lse_of(i);
  }
  top = fmaxf(warp_max(top), sink);
  is_nan = ptx::any(is_nan);
  const float base = top == kNone ? 0.0f : top;  // (-inf) - (-inf) would be NaN
  float sum = 0.0f, x[kMergeQuads][4] = {};
  for (int begin = 0; begin < num_parts; begin += ptx::kWarpSize) {
    const int mine = begin + ptx::lane(), end = num_parts - begin < ptx::kWarpSize ? num_parts - begin : ptx::kWarpSize;
    const float weight = mine < num_parts ? ptx::exp2_approx((lse_of(mine) - base) * kLog2e) : 0.0f;
    for (int first = 0; first < end; first += kMergeParts) {
      const float* part =
          p.part_out + ((first_part + static_cast<int64_t>(begin + first)) * p.num_qo_heads + head) * p.head_dim;
      float w[kMergeParts];  // 0 beyond the last part
      ptx::Bytes16 four[kMergeParts][kMergeQuads];
#pragma unroll
      for (int i = 0; i < kMergeParts; ++i) {
        w[i] = ptx::shfl(weight, first + i);
        if (w[i] == 0.0f) continue;
#pragma unroll
        for (int quad = 0; quad < kMergeQuads; ++quad) {
          const int dim = dim_of(quad);
          if (dim < p.head_dim) {
            four[i][quad] = *reinterpret_cast<const ptx::Bytes16*>(part + i * p.num_qo_heads * p.head_dim + dim);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kMergeParts; ++i) {
        sum += w[i];
        if (w[i] == 0.0f) continue;
#pragma unroll
        for (int quad = 0; quad < kMergeQuads; ++quad) {
          if (dim_of(quad) >= p.head_dim) break;
#pragma unroll
          for (int j = 0; j < 4; ++j) x[quad][j] = ptx::fma(w[i], ptx::bits_float(four[i][quad].word[j]), x[quad][j]);
        }
      }
    }
  }
  const float total = sum + ptx::exp2_approx((sink - base) * kLog2e);
  const float factor = is_nan ? nan : sum == 0.0f ? 0.0f : 1.0f / total;
  T* out = static_cast<T*>(p.out) + at * p.head_dim;
#pragma unroll
  for (int quad = 0; quad < kMergeQuads; ++quad) {
    const int dim = dim_of(quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[quad][j] *= factor;
    if (dim < p.head_dim) store_quad(out + dim, x[quad]);
  }
  if (ptx::lane() == 0) p.lse[at] = is_nan ? nan : sum == 0.0f ? sink : base + logf(total);
}

}  // namespace treedecode::cuda
