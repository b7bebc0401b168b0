// tree_attention without tensor cores: fp32, which they would round, and 16-bit values whose rows are not 16-byte
// aligned. Sums are those of the tensor core kernel in another order.
#pragma once

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kSimtKeys = ptx::kWarpSize;  // of a tile: a lane scores one of them
inline constexpr int kWarpRows = 4;               // a warp's packed rows at a time
inline constexpr int kSimtRows = kWarpRows * kAttentionThreads / ptx::kWarpSize;
inline constexpr int kLaneDims = 8;  // dimensions lane, lane + 32, .. of the output, up to head_dim 256

// Queries, keys and values as fp32. A key's row is one element longer, so that lanes read from different banks.
inline int64_t simt_shared_bytes(int64_t head_dim) {
  return 4 * (kSimtRows * head_dim + kSimtKeys * (head_dim + 1) + kSimtKeys * head_dim);
}

// One warp's rows of the tile from `first_row` on, against the keys of the chunk; the block's warps copy keys together.
template <typename T>
__device__ void simt_rows(const TreeAttentionParams& p, const Tile& t, int first_row, float* shared) {
  const int head_dim = static_cast<int>(p.head_dim), lane = ptx::lane();
  float* q = shared;                          // [kSimtRows, head_dim]
  float* k = q + kSimtRows * head_dim;        // [kSimtKeys, head_dim + 1]
  float* v = k + kSimtKeys * (head_dim + 1);  // [kSimtKeys, head_dim]
  const auto row_of_warp = [&](int i) { return first_row + ptx::warp() * kWarpRows + i; };
  for (int i = ptx::thread(); i < kSimtRows * head_dim; i += kAttentionThreads) {
    const int row = first_row + i / head_dim;
    const PackedRow r = packed_row(p, t, row < t.num_rows ? row : t.num_rows - 1);
    const T* from = static_cast<const T*>(p.q) + r.token * p.q_stride.token + r.head * p.q_stride.head;
    q[i] = ptx::to_float(from[i % head_dim]);
  }
  RowInfo info[kWarpRows];
  float max[kWarpRows], sum[kWarpRows], out[kWarpRows][kLaneDims];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    info[i] = row_info(p, t, row_of_warp(i) < t.num_rows ? row_of_warp(i) : t.num_rows - 1);
    max[i] = kNone;
    sum[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) out[i][d] = 0.0f;
  }
  const int32_t* pages = p.page_table + t.row_begin * p.page_table_stride;
  bool is_bad = false;
  for (int begin = t.token_begin; begin < t.token_end; begin += kSimtKeys) {
    const int num_keys = t.token_end - begin < kSimtKeys ? t.token_end - begin : kSimtKeys;
    bool sees = false;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) sees |= begin < info[i].end && begin + num_keys > info[i].begin;
    if (!ptx::sync_threads_or(sees)) continue;  // the keys before have been used
    for (int key = ptx::warp(); key < num_keys; key += kAttentionThreads / ptx::kWarpSize) {
      const int64_t token = begin + key, page = pages[token / p.page_size], slot = token % p.page_size;
      if (page < 0 || page >= p.num_pages) {
        is_bad = true;
        continue;
      }
      const T* k_row = static_cast<const T*>(p.k_pages) + page * p.k_stride.page + slot * p.k_stride.token +
                       t.kv_head * p.k_stride.head;
      const T* v_row = static_cast<const T*>(p.v_pages) + page * p.v_stride.page + slot * p.v_stride.token +
                       t.kv_head * p.v_stride.head;
      for (int d = lane; d < head_dim; d += ptx::kWarpSize) {
        k[key * (head_dim + 1) + d] = ptx::to_float(k_row[d]);
        v[key * head_dim + d] = ptx::to_float(v_row[d]);
      }
    }
    ptx::sync_threads();
    if (!sees) continue;
    float s[kWarpRows] = {};
    const float* my_key = k + (lane < num_keys ? lane : 0) * (head_dim + 1);
    const float* queries = q + ptx::warp() * kWarpRows * head_dim;
    for (int d = 0; d < head_dim; ++d) {
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) s[i] = ptx::fma(queries[i * head_dim + d], my_key[d], s[i]);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (p.soft_cap > 0) s[i] = p.soft_cap * tanhf(s[i] * p.cap_scale);
      const int key = begin + lane;
      const bool seen = lane < num_keys && key >= info[i].begin && key < info[i].end;
      const float score = seen ? s[i] * p.scale : kNone;
      const float now = fmaxf(max[i], warp_max(score));
      const float base = now == kNone ? 0.0f : now;  // (-inf) - (-inf) would be NaN
      const float rescale = ptx::exp2_approx(max[i] - base);
      s[i] = ptx::exp2_approx(score - base);
      max[i] = now;
      sum[i] = sum[i] * rescale + warp_sum(s[i]);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) out[i][d] *= rescale;
    }
    for (int key = 0; key < num_keys; ++key) {
      float w[kWarpRows];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) w[i] = ptx::shfl(s[i], key);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) {
        if (lane + d * ptx::kWarpSize >= head_dim) break;
        const float x = v[key * head_dim + lane + d * ptx::kWarpSize];
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) out[i][d] = ptx::fma(w[i], x, out[i][d]);
      }
    }
  }
  is_bad = ptx::sync_threads_or(is_bad);  // and the next rows' queries may come
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = row_of_warp(i);
    if (row >= t.num_rows) break;
    float factor;
    const RowTarget target = row_target(p, t, row, info[i].slot, max[i], sum[i], is_bad, lane == 0, factor);
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) {
      const int dim = lane + d * ptx::kWarpSize;
      if (dim >= head_dim) break;
      if (target.is_final) static_cast<T*>(p.out)[target.at + dim] = ptx::from_float<T>(out[i][d] * factor);
      else p.part_out[target.at + dim] = out[i][d] * factor;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    _tree_attention_simt_kernel(const __grid_constant__ TreeAttentionParams p) {
  ptx::launch_next_kernel();        // the merge, which waits for this one's results
  ptx::wait_for_previous_kernel();  // append_kv, in a decoder
  if (!plan_fits(p)) return;
  for (int round = 0;; ++round) {
    const int64_t item = item_of_block(round);
    if (item >= p.counts->num_tiles * p.num_kv_heads) return;
    const Tile t = tile_at(p, item);
    for (int row = 0; row < t.num_rows; row += kSimtRows) simt_rows<T>(p, t, row, ptx::dynamic_shared<float>());
  }
}

}  // namespace treedecode::cuda
