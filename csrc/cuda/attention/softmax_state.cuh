// State of the online softmax in the registers of the tensor core kernel of tree_attention, and its way to results.
//
// Per query row, in units of log2: m_i is the maximum of the scaled scores, l_i the sum of p = 2^(score - m_i), acc
// that of p @ v.
#pragma once

#include "layout.cuh"

namespace treedecode::cuda {

// The part of one thread, laid out as the accumulators of mma: rows lane / 4 and lane / 4 + 8 of each block of 16, and
// two of every 8 columns.
template <int kDim, int kRows>
struct SoftmaxState {
  using S = Split<kDim, kRows>;

  int thread, lane, row_warp, key_warp;
  float m_i[S::kRowBlocks][2];
  float l_i[S::kRowBlocks][2];  // of the keys of this lane
  float acc[S::kRowBlocks][kDim / 8][4];

  __device__ explicit SoftmaxState(int thread)
      : thread(thread),
        lane(thread % ptx::kWarpSize),
        row_warp(thread / ptx::kWarpSize % S::kRowWarps),
        key_warp(thread / ptx::kWarpSize / S::kRowWarps) {}

  __device__ int row_of_lane(int block, int half) const {
    return (row_warp * S::kRowBlocks + block) * 16 + half * 8 + lane / 4;
  }

  // Writes the results of rows that one warp has all keys of.
  template <typename T>
  __device__ void store(const TreeAttentionParams& p, const RowBuffers& rows, bool has_bad_page) const {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_lane(b, half);
        if (row >= rows.tile.num_rows) continue;
        float factor;
        const RowTarget target = row_target(p, rows.tile, row, rows.slot[row], m_i[b][half], l_i[b][half], has_bad_page,
                                            lane % 4 == 0, factor);
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          const int dim = 8 * d + lane % 4 * 2;
          if (dim >= p.head_dim) continue;
          const float x = acc[b][d][2 * half] * factor, y = acc[b][d][2 * half + 1] * factor;
          if (target.is_final) store_pair(static_cast<T*>(p.out) + target.offset + dim, x, y);
          else store_pair(p.part_out + target.offset + dim, x, y);
        }
      }
    }
  }

  // Writes the results of rows whose keys several warps share: their states are merged in the order of the warps.
  template <typename T>
  __device__ void merge_and_store(const TreeAttentionParams& p, RowBuffers& rows,
                                  float* warp_acc /* [kKeyWarps, kRows, kDim] */, bool has_bad_page) const {
    WarpStates& warps = rows.warps;
    const auto max_over_warps = [&](int row) {
      float m = kMinusInf;
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) m = fmaxf(m, warps.m_i[w * kRows + row]);
      return m;
    };
    for (int half = 0; half < 2; ++half) {
      const int i = key_warp * kRows + row_of_lane(0, half);
      if (lane % 4 == 0) {
        warps.m_i[i] = m_i[0][half];
        warps.l_i[i] = l_i[0][half];
      }
    }
    ptx::sync_threads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_lane(0, half);
      const float m = max_over_warps(row), alpha = ptx::exp2_approx(m_i[0][half] - (m == kMinusInf ? 0.0f : m));
      // Swizzled by 8 columns, so that the same columns of four rows lie in different banks.
      float* to = warp_acc + (key_warp * kRows + row) * kDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        store_pair(to + 8 * (d ^ row % 4), acc[0][d][2 * half] * alpha, acc[0][d][2 * half + 1] * alpha);
    }
    ptx::sync_threads();
    constexpr int kQuads = kDim / 4;
    for (int i = thread; i < rows.tile.num_rows * kQuads; i += kAttentionThreads) {
      const int row = i / kQuads, dim = i % kQuads * 4;
      const float m = max_over_warps(row), base = m == kMinusInf ? 0.0f : m;
      float l = 0.0f, x[4] = {};
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) {
        l += warps.l_i[w * kRows + row] * ptx::exp2_approx(warps.m_i[w * kRows + row] - base);
        const auto four =
            *reinterpret_cast<const ptx::Bytes16*>(warp_acc + (w * kRows + row) * kDim + (dim ^ row % 4 * 8));
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] += ptx::bits_float(four.word[j]);
      }
      float factor;
      const RowTarget target = row_target(p, rows.tile, row, rows.slot[row], m, l, has_bad_page, dim == 0, factor);
      if (dim >= p.head_dim) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] *= factor;
      if (target.is_final) store_quad(static_cast<T*>(p.out) + target.offset + dim, x);
      else store_quad(p.part_out + target.offset + dim, x);
    }
  }
};

}  // namespace treedecode::cuda
