// tree_attention without tensor cores: for fp32, which they would round, and for 16-bit values whose rows are not
// aligned to 16 bytes. It adds up what the tensor core kernel does, in another order.
//
// Per query row, in units of log2: m_i is the running maximum of the scaled scores, l_i the running sum of
// p = 2^(score - m_i), acc that of p @ v; alpha = 2^(old m_i - new m_i) brings l_i and acc to a new maximum.
#pragma once

#include <algorithm>

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kSimtKeys = ptx::kWarpSize;  // of a tile: one for each lane of a warp
inline constexpr int kWarpRows = 4;               // a warp's packed rows at a time
inline constexpr int kSimtRows = kWarpRows * kAttentionThreads / ptx::kWarpSize;
inline constexpr int kLaneDims = 8;  // dimensions lane, lane + 32, .. of the output, up to head_dim 256

// Queries, keys and values as fp32. A key's row is one element longer, so that lanes read from different banks.
inline int64_t simt_shared_bytes(int64_t head_dim) {
  return 4 * (kSimtRows * head_dim + kSimtKeys * (head_dim + 1) + kSimtKeys * head_dim);
}

// Attends from kSimtRows rows of a tile, `first_row` and the next, to the keys of the chunk. Each warp has kWarpRows of
// the rows; all warps copy keys.
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
  float m_i[kWarpRows], l_i[kWarpRows], acc[kWarpRows][kLaneDims];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    info[i] = row_info(p, t, row_of_warp(i) < t.num_rows ? row_of_warp(i) : t.num_rows - 1);
    m_i[i] = kMinusInf;
    l_i[i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) acc[i][d] = 0.0f;
  }
  const int32_t* pages = p.page_table + t.branch * p.page_table_stride;
  bool has_bad_page = false;
  for (int begin = t.token_begin; begin < t.token_end; begin += kSimtKeys) {
    const int num_keys = t.token_end - begin < kSimtKeys ? t.token_end - begin : kSimtKeys;
    bool is_visible = false;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
      is_visible |= begin < info[i].visible_end && begin + num_keys > info[i].visible_begin;
    if (!ptx::sync_threads_or(is_visible)) continue;  // nobody needs the keys before any more
    for (int key = ptx::warp(); key < num_keys; key += kAttentionThreads / ptx::kWarpSize) {
      const int64_t token = begin + key, page = pages[token / p.page_size], slot = token % p.page_size;
      if (page < 0 || page >= p.num_pages) {
        has_bad_page = true;
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
    if (!is_visible) continue;
    float s[kWarpRows] = {};
    const float* k_row = k + (lane < num_keys ? lane : 0) * (head_dim + 1);
    const float* queries = q + ptx::warp() * kWarpRows * head_dim;
    for (int d = 0; d < head_dim; ++d) {
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) s[i] = ptx::fma(queries[i * head_dim + d], k_row[d], s[i]);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (p.soft_cap > 0) s[i] = p.soft_cap * tanhf(s[i] * p.cap_scale);
      const int key = begin + lane;
      const bool key_visible = lane < num_keys && key >= info[i].visible_begin && key < info[i].visible_end;
      const float score = key_visible ? s[i] * p.scale : kMinusInf;
      const float m_new = fmaxf(m_i[i], warp_max(score));
      const float base = m_new == kMinusInf ? 0.0f : m_new;  // (-inf) - (-inf) would be NaN
      const float alpha = ptx::exp2_approx(m_i[i] - base);
      s[i] = ptx::exp2_approx(score - base);
      m_i[i] = m_new;
      l_i[i] = l_i[i] * alpha + warp_sum(s[i]);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) acc[i][d] *= alpha;
    }
    int first_visible = info[0].visible_begin;  // values of earlier keys may hold anything
#pragma unroll
    for (int i = 1; i < kWarpRows; ++i) first_visible = std::min(first_visible, info[i].visible_begin);
    for (int key = std::max(0, first_visible - begin); key < num_keys; ++key) {
      float probs[kWarpRows];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) probs[i] = ptx::shfl(s[i], key);
#pragma unroll
      for (int d = 0; d < kLaneDims; ++d) {
        if (lane + d * ptx::kWarpSize >= head_dim) break;
        const float x = v[key * head_dim + lane + d * ptx::kWarpSize];
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) acc[i][d] = ptx::fma(probs[i], x, acc[i][d]);
      }
    }
  }
  has_bad_page = ptx::sync_threads_or(has_bad_page);  // and nobody needs q any more
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = row_of_warp(i);
    if (row >= t.num_rows) break;
    float factor;
    const RowTarget target = row_target(p, t, row, info[i].slot, m_i[i], l_i[i], has_bad_page, lane == 0, factor);
#pragma unroll
    for (int d = 0; d < kLaneDims; ++d) {
      const int dim = lane + d * ptx::kWarpSize;
      if (dim >= head_dim) break;
      if (target.is_final) static_cast<T*>(p.out)[target.offset + dim] = ptx::from_float<T>(acc[i][d] * factor);
      else p.part_out[target.offset + dim] = acc[i][d] * factor;
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
    const Tile t = load_tile(p, item);
    for (int row = 0; row < t.num_rows; row += kSimtRows) simt_rows<T>(p, t, row, ptx::dynamic_shared<float>());
  }
}

}  // namespace treedecode::cuda
