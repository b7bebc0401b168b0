// Shared by the attention kernels: the tiles of a plan and their order, the keys that a row sees, and the place of its
// result.
#pragma once

#include <cmath>
#include <limits>

#include "../common/collectives.cuh"
#include "tree_attention.h"

namespace treedecode::cuda {

inline constexpr int kTileRows = cpu::kTileRows;
inline constexpr int kAttentionThreads = 128;
inline constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kLn2 = 0.69314718055994531f;

// Packed rows [first_row, first_row + num_rows) of a chunk, for one kv head. Packed row r is query head
// kv_head * group + r % group of the query token number first_query + r / group in the plan's order.
struct Tile {
  int row_begin, row_end;  // in the plan's order
  int branch;              // of row_begin, whose pages are read
  int token_begin, token_end;
  int part;
  int kv_head;
  int first_query;
  int first_row;
  int num_rows;
};

// Returns the last i of [0, n) with value_at(i) <= x, where value_at(0) <= x and value_at never decreases. All lanes of
// a warp call it.
template <typename ValueAt>
__device__ int warp_search(int n, int x, ValueAt value_at) {
  int begin = 0, end = n;
  while (end - begin > 1) {
    const int step = (end - begin + ptx::kWarpSize - 1) / ptx::kWarpSize;
    const int i = begin + ptx::lane() * step;
    const int num_before = ptx::popc(ptx::ballot(i < end && value_at(i) <= x));
    begin += num_before ? (num_before - 1) * step : 0;
    end = begin + step < end ? begin + step : end;
  }
  return begin;
}

// Returns the last b of [begin, end) with indptr[b] <= x, which is the row that x lies in: empty rows come before it.
__device__ inline int find_row(const int32_t* indptr, int begin, int end, int x) {
  while (end - begin > 1) {
    const int middle = begin + (end - begin) / 2;
    if (indptr[middle] <= x) begin = middle;
    else end = middle;
  }
  return begin;
}

// True if the plan is a flat one for pages of this size and fits the outputs. The host cannot check that without
// waiting for the device.
__device__ inline bool plan_fits(const TreeAttentionParams& p) {
  const cpu::PlanCounts& n = *p.counts;
  return n.num_chunks >= 0 && n.num_chunks <= p.max_chunks && (n.num_tiles > 0) == (n.num_chunks > 0) &&
         n.num_parts >= 0 && n.num_parts <= p.max_parts && n.page_size == p.page_size && p.q_indptr[0] == 0 &&
         p.q_indptr[p.num_rows] <= p.num_q && p.row_indptr[0] == 0 &&
         p.row_indptr[p.num_rows] == p.q_indptr[p.num_rows];
}

// The branch of a row in the plan's order.
__device__ inline int branch_of(const TreeAttentionParams& p, int row) {
  const int branch = p.order[row];
  return branch >= 0 && branch < p.num_rows ? branch : 0;
}

// The items of one tile are its kv heads, so tiles of one chunk follow closely and find their pages in L2. All lanes of
// a warp call it.
__device__ inline Tile load_tile(const TreeAttentionParams& p, int64_t item) {
  const int tile = static_cast<int>(item / p.num_kv_heads);
  const int c = warp_search(p.counts->num_chunks, tile, [&](int i) { return p.chunks[i].tile_begin; });
  const cpu::FlatChunk& chunk = p.chunks[c];
  const auto clamp = [](int64_t x, int64_t limit) { return static_cast<int>(x < 0 ? 0 : x > limit ? limit : x); };
  Tile t;
  t.row_begin = clamp(chunk.row_begin, p.num_rows);
  t.row_end = clamp(chunk.row_end, p.num_rows);
  t.token_begin = clamp(chunk.token_begin, p.max_pages * p.page_size);
  t.token_end = clamp(chunk.token_end, p.max_pages * p.page_size);
  t.part = chunk.part;
  t.kv_head = static_cast<int>(item % p.num_kv_heads);
  t.first_row = kTileRows * (tile - chunk.tile_begin);
  t.branch = t.row_begin < p.num_rows ? branch_of(p, t.row_begin) : 0;
  t.first_query = p.row_indptr[t.row_begin];
  t.num_rows = clamp((p.row_indptr[t.row_end] - t.first_query) * p.group_size - t.first_row, kTileRows);
  return t;
}

struct PackedRow {
  int branch;
  int query;  // of the branch
  int token;  // row of q
  int head;
};
__device__ inline PackedRow packed_row(const TreeAttentionParams& p, const Tile& t, int row) {
  const int r = t.first_row + row, i = r / p.group_size, query = t.first_query + i;
  int b = t.row_begin + i;  // a guess, right where all branches have one query
  if (b >= t.row_end || p.row_indptr[b] > query || p.row_indptr[b + 1] <= query) {
    b = find_row(p.row_indptr, t.row_begin, t.row_end, query);
  }
  PackedRow packed;
  packed.branch = branch_of(p, b);
  packed.query = query - p.row_indptr[b];
  const int64_t token = static_cast<int64_t>(p.q_indptr[packed.branch]) + packed.query;
  packed.token = token >= 0 && token < p.num_q ? static_cast<int>(token) : 0;
  packed.head = t.kv_head * p.group_size + r - i * p.group_size;
  return packed;
}

struct RowInfo {
  int visible_begin, visible_end;  // keys of the chunk that the row sees; (token_end, token_begin) if it sees none
  int slot;                        // of its partial result; -1: the branch has one part, the result is final
};
__device__ inline RowInfo row_info(const TreeAttentionParams& p, const Tile& t, int row) {
  const PackedRow r = packed_row(p, t, row);
  const int b = r.branch, q_len = p.q_indptr[b + 1] - p.q_indptr[b];
  const int64_t position = static_cast<int64_t>(p.seq_lens[b]) - q_len + r.query;
  const int64_t window_begin = p.window_left < 0 ? 0 : position - p.window_left;
  const int part_begin = p.part_indptr[b], num_parts = (p.part_indptr[b + 1] - part_begin) / q_len;
  RowInfo info;
  info.visible_begin = window_begin > t.token_begin
                           ? static_cast<int>(window_begin < t.token_end ? window_begin : t.token_end)
                           : t.token_begin;
  info.visible_end = position + 1 < t.token_end ? static_cast<int>(position + 1) : t.token_end;
  if (info.visible_end <= info.visible_begin) {
    info.visible_begin = t.token_end;
    info.visible_end = t.token_begin;
  }
  info.slot = num_parts == 1 ? -1 : part_begin + r.query * num_parts + t.part;
  return info;
}

// The result of a row with maximum m_i and sum l_i, both in units of log2; `sink` is a logit, -inf for none.
struct RowResult {
  float factor;  // acc * factor is the row of out
  float lse;
};
__device__ inline RowResult finish_row(float m_i, float l_i, float sink) {
  if (m_i == kMinusInf) return {0.0f, sink};
  const float sink_log2 = sink * kLog2e;
  const float m_new = sink_log2 > m_i ? sink_log2 : m_i;
  const float alpha = ptx::exp2_approx(m_i - m_new);
  const float l_new = l_i * alpha + ptx::exp2_approx(sink_log2 - m_new);
  return {alpha / l_new, m_new * kLn2 + logf(l_new)};
}

// The place of a row's values, in out or part_out.
struct RowTarget {
  int64_t offset;  // of its first value
  bool is_final;   // in out
};

// Writes the lse of a row, sets the `factor` of its acc, and returns the place of its values. Every thread of the row
// calls it; the one with `writes_lse` writes.
__device__ inline RowTarget row_target(const TreeAttentionParams& p, const Tile& t, int row, int slot, float m_i,
                                       float l_i, bool has_bad_page, bool writes_lse, float& factor) {
  const PackedRow r = packed_row(p, t, row);
  const bool is_final = slot < 0;
  const RowResult result = finish_row(m_i, l_i, is_final && p.sinks ? p.sinks[r.head] : kMinusInf);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t i = static_cast<int64_t>(is_final ? r.token : slot) * p.num_qo_heads + r.head;
  float* lse = is_final ? p.lse : p.part_lse;
  if (writes_lse && lse) lse[i] = has_bad_page ? nan : result.lse;
  factor = has_bad_page ? nan : result.factor;
  return {i * p.head_dim, is_final};
}

// Store two or four neighbouring values in one access; `to` is aligned to all of them.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float x, float y) {
  if constexpr (std::is_same_v<T, float>) *reinterpret_cast<ptx::Pair*>(to) = {x, y};
  else *reinterpret_cast<uint32_t*>(to) = ptx::pack<T>(x, y);
}
template <typename T>
__device__ __forceinline__ void store_quad(T* to, const float (&x)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<ptx::Bytes16*>(to) = {
        {ptx::float_bits(x[0]), ptx::float_bits(x[1]), ptx::float_bits(x[2]), ptx::float_bits(x[3])}};
  } else {
    *reinterpret_cast<ptx::Bytes8*>(to) = {{ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3])}};
  }
}

// Returns the item that this block takes in a round. Items come roughly sorted by cost, so blocks take them in order in
// even rounds, and in reverse order in odd ones. A block is done at the first item that does not exist.
__device__ __forceinline__ int64_t item_of_block(int round) {
  const int64_t grid = ptx::grid_x(), block = ptx::block_x();
  return round * grid + (round % 2 ? grid - 1 - block : block);
}

}  // namespace treedecode::cuda
