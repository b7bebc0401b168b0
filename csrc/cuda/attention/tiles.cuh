// What the attention kernels share: which tile of the plan is whose, which keys a row sees, where its result goes.
#pragma once

#include <cmath>
#include <limits>

#include "../common/collectives.cuh"
#include "tree_attention.h"

namespace treedecode::cuda {

inline constexpr int kTileRows = cpu::kTileRows;
inline constexpr int kAttentionThreads = 128;
inline constexpr float kNone = -std::numeric_limits<float>::infinity();
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kLn2 = 0.69314718055994531f;

// Packed rows [first_row, first_row + num_rows) of a chunk, for one kv head. Packed row r is query token
// first_token + r / group, query head kv_head * group + r % group.
struct Tile {
  int row_begin, row_end;  // of the page table
  int token_begin, token_end;
  int part;
  int kv_head;
  int first_token;
  int first_row;
  int num_rows;
};

// The last i of [0, n) with at(i) <= x, where at(0) <= x and at() never decreases. Called by all lanes of a warp.
template <typename At>
__device__ int warp_search(int n, int x, At at) {
  int begin = 0, end = n;
  while (end - begin > 1) {
    const int step = (end - begin + ptx::kWarpSize - 1) / ptx::kWarpSize;
    const int i = begin + ptx::lane() * step;
    const int num_before = ptx::popc(ptx::ballot(i < end && at(i) <= x));
    begin += num_before ? (num_before - 1) * step : 0;
    end = begin + step < end ? begin + step : end;
  }
  return begin;
}

// The last b of [begin, end) with indptr[b] <= x, by one thread: the row that x lies in, since empty ones come before.
__device__ inline int row_of(const int32_t* indptr, int begin, int end, int x) {
  while (end - begin > 1) {
    const int middle = begin + (end - begin) / 2;
    if (indptr[middle] <= x) begin = middle;
    else end = middle;
  }
  return begin;
}

// Whether the plan is for no more query tokens, pages of this size and a GPU. What the host cannot know without
// waiting.
__device__ inline bool plan_fits(const TreeAttentionParams& p) {
  const cpu::PlanCounts& n = *p.counts;
  return n.num_chunks >= 0 && n.num_chunks <= p.max_chunks && (n.num_tiles > 0) == (n.num_chunks > 0) &&
         n.num_parts >= 0 && n.num_parts <= p.max_parts && n.page_size == p.page_size && p.q_indptr[0] == 0 &&
         p.q_indptr[p.num_rows] <= p.num_q;
}

// Tiles of one chunk are num_kv_heads items apart, near enough to find their pages in L2; all lanes of a warp call it.
__device__ inline Tile tile_at(const TreeAttentionParams& p, int64_t item) {
  const int tile = static_cast<int>(item / p.num_kv_heads);
  const int c = warp_search(p.counts->num_chunks, tile, [&](int i) { return p.chunks[i].tile_begin; });
  const cpu::FlatChunk& chunk = p.chunks[c];
  const auto clamp = [](int64_t x, int64_t high) { return static_cast<int>(x < 0 ? 0 : x > high ? high : x); };
  Tile t;
  t.row_begin = clamp(chunk.row_begin, p.num_rows);
  t.row_end = clamp(chunk.row_end, p.num_rows);
  t.token_begin = clamp(chunk.token_begin, p.max_pages * p.page_size);
  t.token_end = clamp(chunk.token_end, p.max_pages * p.page_size);
  t.part = chunk.part;
  t.kv_head = static_cast<int>(item % p.num_kv_heads);
  t.first_row = kTileRows * (tile - chunk.tile_begin);
  t.first_token = p.q_indptr[t.row_begin];
  t.num_rows = clamp((p.q_indptr[t.row_end] - t.first_token) * p.group_size - t.first_row, kTileRows);
  return t;
}

struct PackedRow {
  int token;
  int head;
};
__device__ inline PackedRow packed_row(const TreeAttentionParams& p, const Tile& t, int row) {
  const int r = t.first_row + row, token = r / p.group_size;
  return {t.first_token + token, t.kv_head * p.group_size + r - token * p.group_size};
}

struct RowInfo {
  int begin, end;  // keys of the chunk that the row sees; a row that sees none has begin = token_end, end = token_begin
  int slot;        // of its partial result; -1: the branch has one part, the result is final
};
__device__ inline RowInfo row_info(const TreeAttentionParams& p, const Tile& t, int row) {
  const int token = packed_row(p, t, row).token;
  int b = t.row_begin + token - t.first_token;  // right where all branches have one query
  if (b >= t.row_end || p.q_indptr[b] > token || p.q_indptr[b + 1] <= token) {
    b = row_of(p.q_indptr, t.row_begin, t.row_end, token);
  }
  const int first = p.q_indptr[b], q_len = p.q_indptr[b + 1] - first;
  const int64_t position = static_cast<int64_t>(p.seq_lens[b]) - q_len + (token - first);
  const int64_t from = p.window_left < 0 ? 0 : position - p.window_left;
  const int part_begin = p.part_indptr[b], num_parts = (p.part_indptr[b + 1] - part_begin) / q_len;
  RowInfo info;
  info.begin = from > t.token_begin ? static_cast<int>(from < t.token_end ? from : t.token_end) : t.token_begin;
  info.end = position + 1 < t.token_end ? static_cast<int>(position + 1) : t.token_end;
  if (info.end <= info.begin) {
    info.begin = t.token_end;
    info.end = t.token_begin;
  }
  info.slot = num_parts == 1 ? -1 : part_begin + (token - first) * num_parts + t.part;
  return info;
}

// What a row's sums come to: `max` in units of log2, `sum` relative to 2^max, `sink` a logit, -inf for none.
struct RowResult {
  float factor;  // of the weighted sum of values
  float lse;
};
__device__ inline RowResult finish_row(float max, float sum, float sink) {
  if (max == kNone) return {0.0f, sink};
  const float sink_log2 = sink * kLog2e;
  const float top = sink_log2 > max ? sink_log2 : max;
  const float keys = ptx::exp2_approx(max - top);
  const float total = sum * keys + ptx::exp2_approx(sink_log2 - top);
  return {keys / total, top * kLn2 + logf(total)};
}

// Where a row's values go: out or part_out.
struct RowTarget {
  int64_t at;  // element of its first value
  bool is_final;
};

// Writes the row's lse, and returns what its values are to be multiplied with and where they go. Every thread of the
// row calls it, the one that `writes_lse` writes. `is_bad`: a page id was out of range.
__device__ inline RowTarget row_target(const TreeAttentionParams& p, const Tile& t, int row, int slot, float max,
                                       float sum, bool is_bad, bool writes_lse, float& factor) {
  const PackedRow r = packed_row(p, t, row);
  const bool is_final = slot < 0;
  const RowResult result = finish_row(max, sum, is_final && p.sinks ? p.sinks[r.head] : kNone);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t at = static_cast<int64_t>(is_final ? r.token : slot) * p.num_qo_heads + r.head;
  if (writes_lse) (is_final ? p.lse : p.part_lse)[at] = is_bad ? nan : result.lse;
  factor = is_bad ? nan : result.factor;
  return {at * p.head_dim, is_final};
}

// Two or four values that follow one another, `to` aligned to all of them; each a single access.
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

// The item that this block takes in a round: every grid_x-th, in turns forwards and backwards, because items come
// sorted by cost, roughly. No items are left for a block from the first round on whose item is `num_items` or more.
__device__ __forceinline__ int64_t item_of_block(int round) {
  const int64_t grid = ptx::grid_x(), block = ptx::block_x();
  return round * grid + (round % 2 ? grid - 1 - block : block);
}

}  // namespace treedecode::cuda
