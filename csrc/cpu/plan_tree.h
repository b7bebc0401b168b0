// plan_tree: which rows share which pages, cut into chunks of comparable cost.
#pragma once

#include <algorithm>
#include <cstdint>

namespace treedecode::cpu {

// Columns of `chunks`.
inline constexpr int64_t kChunkColumns = 6;

// The cost model, in whole numbers so that every implementation of the op cuts alike. The unit is one packed row
// (query token x query head of a kv head) attending to one token.
inline constexpr int64_t kReadRows = 16;      // reading one token's K and V costs as much as this many packed rows
inline constexpr int64_t kPartTokens = 32;    // a packed row's partial costs as much as attending to this many tokens
inline constexpr int64_t kTargetItems = 128;  // work items (chunk x kv head) aimed at in one step
inline constexpr int64_t kMinChunkTokens = 128;   // a node is not cut below this
inline constexpr int64_t kMaxChunkTokens = 2048;  // nor left longer than this (or one page, if that is more)

struct PlanTreeParams {
  const int32_t* page_table;  // [num_rows, max_pages], row stride table_stride
  const int32_t* seq_lens;    // [num_rows]
  const int32_t* q_lens;      // [num_rows], or null: 1 each
  int32_t* q_indptr;          // [num_rows + 1]
  int32_t* part_indptr;       // [num_rows + 1]
  int32_t* chunks;            // [max_chunks, 6] row_begin, row_end, token_begin, token_end, path_ordinal, 0
  int32_t* counts;            // [4] num_chunks, num_parts, unique_tokens, path_tokens
  int64_t num_rows;
  int64_t max_pages;
  int64_t table_stride;  // elements
  int64_t page_size;
  int64_t group_size;  // num_qo_heads / num_kv_heads
  int64_t num_kv_heads;
};

// Worst case over all page tables of this shape. A forest with B leaves has at most 2B - 1 nodes that hold tokens, a
// node of n whole pages is cut into at most 1 + n * page_size / 128 chunks of whole pages, and the nodes' pages add up
// to at most B * max_pages.
inline int64_t max_chunks(int64_t num_rows, int64_t max_pages, int64_t page_size) {
  const int64_t pages = num_rows * max_pages;
  return std::min(pages, std::max<int64_t>(0, 2 * num_rows - 1) + pages * page_size / kMinChunkTokens);
}

// shared[row] = number of leading pages that rows row - 1 and row have in common, for rows in [row_begin, row_end);
// shared[0] = 0. Rows are independent, so the ranges may be computed in parallel.
void common_pages(const PlanTreeParams& p, int32_t* shared, int64_t row_begin, int64_t row_end);  // [num_rows]

// Writes the plan. False, with q_indptr and so on half written, if a count does not fit an int32.
bool plan_tree(const PlanTreeParams& p, const int32_t* shared);  // [num_rows]

}  // namespace treedecode::cpu
