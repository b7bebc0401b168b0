// What the tensor core kernel of tree_attention sums up in registers, and how it becomes results.
#pragma once

#include "layout.cuh"

namespace treedecode::cuda {

// A thread's part, laid out as mma's accumulators: rows lane / 4 and 8 more of each block of 16, two of every 8
// columns.
template <int kDim, int kRows>
struct RowSums {
  using S = Split<kDim, kRows>;

  int thread, lane, row_warp, key_warp;
  float max[S::kRowBlocks][2];  // of scores, in units of log2
  float sum[S::kRowBlocks][2];  // of this lane's probabilities, relative to 2^max
  float out[S::kRowBlocks][kDim / 8][4];

  __device__ explicit RowSums(int thread)
      : thread(thread),
        lane(thread % ptx::kWarpSize),
        row_warp(thread / ptx::kWarpSize % S::kRowWarps),
        key_warp(thread / ptx::kWarpSize / S::kRowWarps) {}

  __device__ int row_of_lane(int block, int half) const {
    return (row_warp * S::kRowBlocks + block) * 16 + half * 8 + lane / 4;
  }

  template <typename T>
  __device__ void finish_alone(const TreeAttentionParams& p, const RowBuffers& rows, bool is_bad) const {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of_lane(b, half);
        if (row >= rows.tile.num_rows) continue;
        float factor;
        const RowTarget target =
            row_target(p, rows.tile, row, rows.slot[row], max[b][half], sum[b][half], is_bad, lane % 4 == 0, factor);
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          const int dim = 8 * d + lane % 4 * 2;
          if (dim >= p.head_dim) continue;
          const float x = out[b][d][2 * half] * factor, y = out[b][d][2 * half + 1] * factor;
          if (target.is_final) store_pair(static_cast<T*>(p.out) + target.at + dim, x, y);
          else store_pair(p.part_out + target.at + dim, x, y);
        }
      }
    }
  }

  // Warps saw different keys of the same rows: their sums are added in the order of the warps.
  template <typename T>
  __device__ void finish_together(const TreeAttentionParams& p, RowBuffers& rows,
                                  float* outs /* [kKeyWarps, kRows, kDim] */, bool is_bad) const {
    float (&maxima)[kNumWarps * 16] = rows.sums[0];
    float (&all_sums)[kNumWarps * 16] = rows.sums[1];
    const auto top_of = [&](int row) {
      float top = kNone;
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) top = fmaxf(top, maxima[w * kRows + row]);
      return top;
    };
    for (int half = 0; half < 2; ++half) {
      const int at = key_warp * kRows + row_of_lane(0, half);
      if (lane % 4 == 0) {
        maxima[at] = max[0][half];
        all_sums[at] = sum[0][half];
      }
    }
    ptx::sync_threads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_lane(0, half);
      const float top = top_of(row), scale = ptx::exp2_approx(max[0][half] - (top == kNone ? 0.0f : top));
      // Eights of columns change places, so that the same columns of four rows lie in different banks.
      float* to = outs + (key_warp * kRows + row) * kDim + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        store_pair(to + 8 * (d ^ row % 4), out[0][d][2 * half] * scale, out[0][d][2 * half + 1] * scale);
    }
    ptx::sync_threads();
    constexpr int kQuads = kDim / 4;
    for (int i = thread; i < rows.tile.num_rows * kQuads; i += kAttentionThreads) {
      const int row = i / kQuads, dim = i % kQuads * 4;
      const float top = top_of(row), base = top == kNone ? 0.0f : top;
      float total = 0.0f, x[4] = {};
#pragma unroll
      for (int w = 0; w < S::kKeyWarps; ++w) {
        total += all_sums[w * kRows + row] * ptx::exp2_approx(maxima[w * kRows + row] - base);
        const auto four = *reinterpret_cast<const ptx::Bytes16*>(outs + (w * kRows + row) * kDim + (dim ^ row % 4 * 8));
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] += ptx::bits_float(four.word[j]);
      }
      float factor;
      const RowTarget target = row_target(p, rows.tile, row, rows.slot[row], top, total, is_bad, dim == 0, factor);
      if (dim >= p.head_dim) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] *= factor;
      if (target.is_final) store_quad(static_cast<T*>(p.out) + target.at + dim, x);
      else store_quad(p.part_out + target.at + dim, x);
    }
  }
};

}  // namespace treedecode::cuda
