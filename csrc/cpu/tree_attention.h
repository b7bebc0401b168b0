// tree_attention: attention of many branches to the pages of a tree. Every chunk of shared pages is read once.
//
// Per query row and segment, in units of log2: m_i is the running maximum of the scaled scores, rounded up to a whole
// number, l_i the running sum of p = 2^(score - m_i), acc that of p @ v; alpha = 2^(old m_i - new m_i) brings l_i and
// acc to a new maximum.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "plan_tree.h"
#include "strides.h"

namespace treedecode::cpu {

struct TreeAttentionParams {
  const void* q;               // [num_q, num_qo_heads, head_dim], strides in q_stride
  const void* k_pages;         // [num_pages, page_size, num_kv_heads, head_dim], strides in k_stride
  const void* v_pages;         // same shape, strides in v_stride
  const int32_t* page_table;   // [num_rows, max_pages], row stride page_table_stride
  const int32_t* seq_lens;     // [num_rows]
  const int32_t* q_indptr;     // [num_rows + 1]
  const int32_t* part_indptr;  // [num_rows + 1]
  const int32_t* order;        // [num_rows] branches in the plan's order
  const int32_t* row_indptr;   // [num_rows + 1]
  const ChainedChunk* chunks;  // [num_chunks]
  const float* sinks;          // [num_qo_heads] or null
  void* out;                   // [num_q, num_qo_heads, head_dim] contiguous, dtype
  float* lse;                  // [num_q, num_qo_heads] or null
  float* parts;                // [num_parts, num_qo_heads, part_stride(head_dim)] see Part
  int64_t num_rows;
  int64_t num_qo_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  int64_t page_table_stride;
  TokenStride q_stride;  // in elements, as all strides
  PageStride k_stride;
  PageStride v_stride;
  float sm_scale;
  float soft_cap;       // <= 0: none
  int64_t window_left;  // < 0: unlimited
  DType dtype;
};

// State of a query head after the keys of a segment so far. The next chunk of the segment goes on from it, and in the
// end the parts of a query are merged. m_i is a whole number, so that a new maximum changes no digit of acc and l_i,
// and keys are added one after the other, lane by lane: the result does not depend on where chunks and tiles begin.
struct Part {
  float* acc;  // [head_dim]; not written before the first key, while m_i == -inf and all of l_i == 0
  float* l_i;  // [kSumLanes] key i is added to lane i % kSumLanes
  float* m_i;  // [1]
};
constexpr int64_t kSumLanes = 16;
static inline int64_t part_stride(int64_t head_dim) { return head_dim + 2 * kSumLanes; }
static inline Part part_at(const TreeAttentionParams& p, int64_t part, int64_t head) {
  float* acc = p.parts + (part * p.num_qo_heads + head) * part_stride(p.head_dim);
  return {acc, acc + p.head_dim, acc + p.head_dim + kSumLanes};
}

// Keys are packed and multiplied kTile tokens at a time, in tiles that begin at multiples of kTile. At most kBlockRows
// packed query rows share one pass over the keys of a chunk, and kStripRows of them one buffer of scores.
constexpr int64_t kTile = 128;
constexpr int64_t kGroup = 32;  // keys that tile registers take together, from multiples of it on
constexpr int64_t kBlockRows = 256;
constexpr int64_t kStripRows = 48;

// Packed rows [row_begin, row_end), at most kBlockRows of them, of one chunk and kv head. Packed row r is query head
// kv_head * group + r % group of the query token number row_indptr[chunk's row_begin] + r / group in the plan's order.
struct TreeAttentionItem {
  int64_t chunk;
  int64_t kv_head;
  int64_t row_begin;
  int64_t row_end;
};

// A query token of a branch.
struct Query {
  int64_t token, branch;
};
// Returns the query token with the number `planned` in the plan's order, in the row `row` or a later one, and moves
// `row` there.
static inline Query query_at(const TreeAttentionParams& p, int64_t planned, int64_t& row) {
  while (planned >= p.row_indptr[row + 1]) ++row;
  const int64_t branch = p.order[row];
  return {p.q_indptr[branch] + planned - p.row_indptr[row], branch};
}

// Keys [begin, end) that query token t of branch b sees, before clipping to a chunk.
struct Visible {
  int64_t begin, end;
};
static inline Visible visible_keys(const TreeAttentionParams& p, int64_t b, int64_t t) {
  const int64_t position = static_cast<int64_t>(p.seq_lens[b]) - (p.q_indptr[b + 1] - p.q_indptr[b]) + t;
  const int64_t begin = p.window_left < 0 || position < p.window_left ? 0 : position - p.window_left;
  return {begin, position + 1};
}

static inline int64_t num_parts(const TreeAttentionParams& p, int64_t b) {
  const int64_t q_len = p.q_indptr[b + 1] - p.q_indptr[b];
  return q_len ? (p.part_indptr[b + 1] - p.part_indptr[b]) / q_len : 0;
}

// Bytes of scratch that one thread needs for Scratch in tree_attention.cpp, whatever its instruction set.
static inline int64_t tree_attention_scratch(int64_t head_dim) {
  const int64_t wide = (head_dim + 63) / 64 * 64;
  const int64_t rows = 2 * wide + 6 + kSumLanes;
  return 4 * (kBlockRows * rows + 2 * kTile * wide + kStripRows * (kTile + 16)) + 4 * 8 * kTile;
}

}  // namespace treedecode::cpu

// Computes items one after another, and prefetches the pages of the next one meanwhile. Writes `out` and `lse` where a
// branch of one part ends, and the part otherwise. A row's result does not depend on the rows computed with it.
TD_DECLARE_KERNEL(tree_attention, void tree_attention(const TreeAttentionParams& p, const TreeAttentionItem* items,
                                                      int64_t count, void* scratch))

// Merges the parts of rows (branches) [row_begin, row_end) along their paths; branches of one part are final already.
TD_DECLARE_KERNEL(tree_attention_merge,
                  void tree_attention_merge(const TreeAttentionParams& p, int64_t row_begin, int64_t row_end))
