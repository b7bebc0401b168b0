// The second launch of tree_attention: merges the partial results of a query token along its branch's path.
//
// Per query token and head: m is the maximum of the parts' lse and the sink, w = exp(lse - m) the weight of a part, l
// the sum of weights, acc that of w * part_out.
#pragma once

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kMergeLoads = 8;  // of a lane, in flight at once

// Dimensions that a warp holds with four in each lane.
inline constexpr int64_t kQuadDims = 4 * ptx::kWarpSize;

// Each warp merges one query token and head, of up to kMergeQuads * kQuadDims dimensions. Parts are added in the order
// of the path.
template <typename T, int kMergeQuads>
__global__ void __launch_bounds__(kAttentionThreads)
    _tree_attention_merge_kernel(const __grid_constant__ TreeAttentionParams p) {
  ptx::wait_for_previous_kernel();
  constexpr int kWarps = kAttentionThreads / ptx::kWarpSize, kMergeParts = kMergeLoads / kMergeQuads;
  const int64_t row = static_cast<int64_t>(ptx::block_x()) * kWarps + ptx::warp();
  if (row >= p.num_q * p.num_qo_heads) return;
  const int token = static_cast<int>(row / p.num_qo_heads), head = static_cast<int>(row % p.num_qo_heads);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  int first_part = 0, num_parts = 0;
  const bool fits = plan_fits(p);
  const bool is_idle = token >= p.q_indptr[p.num_rows];  // belongs to no branch
  if (fits && !is_idle) {
    const int b = warp_search(static_cast<int>(p.num_rows), token, [&](int i) { return p.q_indptr[i]; });
    const int first = p.q_indptr[b], q_len = p.q_indptr[b + 1] - first;
    num_parts = (p.part_indptr[b + 1] - p.part_indptr[b]) / q_len;
    first_part = p.part_indptr[b] + (token - first) * num_parts;
    if (num_parts == 1) return;  // already final
  }
  const auto lse_of = [&](int i) { return p.part_lse[(first_part + static_cast<int64_t>(i)) * p.num_qo_heads + head]; };
  const auto dim_of = [](int quad) { return 4 * (quad * ptx::kWarpSize + ptx::lane()); };
  const float sink = p.sinks && !is_idle ? p.sinks[head] : kMinusInf;
  float m = kMinusInf;
  bool is_nan = !fits;  // kept apart, because fmaxf drops NaN
  for (int i = ptx::lane(); i < num_parts; i += ptx::kWarpSize) {
    m = fmaxf(m, lse_of(i));
    is_nan |= lse_of(i) != lse_of(i);
  }
  m = fmaxf(warp_max(m), sink);
  is_nan = ptx::any(is_nan);
  const float base = m == kMinusInf ? 0.0f : m;  // (-inf) - (-inf) would be NaN
  float l = 0.0f, acc[kMergeQuads][4] = {};
  for (int begin = 0; begin < num_parts; begin += ptx::kWarpSize) {
    const int lane_part = begin + ptx::lane(),
              end = num_parts - begin < ptx::kWarpSize ? num_parts - begin : ptx::kWarpSize;
    const float weight = lane_part < num_parts ? ptx::exp2_approx((lse_of(lane_part) - base) * kLog2e) : 0.0f;
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
        l += w[i];
        if (w[i] == 0.0f) continue;
#pragma unroll
        for (int quad = 0; quad < kMergeQuads; ++quad) {
          if (dim_of(quad) >= p.head_dim) break;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            acc[quad][j] = ptx::fma(w[i], ptx::bits_float(four[i][quad].word[j]), acc[quad][j]);
          }
        }
      }
    }
  }
  const float l_with_sink = l + ptx::exp2_approx((sink - base) * kLog2e);
  const float factor = is_nan ? nan : l == 0.0f ? 0.0f : 1.0f / l_with_sink;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
#pragma unroll
  for (int quad = 0; quad < kMergeQuads; ++quad) {
    const int dim = dim_of(quad);
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[quad][j] *= factor;
    if (dim < p.head_dim) store_quad(out + dim, acc[quad]);
  }
  if (ptx::lane() == 0 && p.lse) p.lse[row] = is_nan ? nan : l == 0.0f ? sink : base + logf(l_with_sink);
}

}  // namespace treedecode::cuda
