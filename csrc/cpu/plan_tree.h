// plan_tree: which rows share which pages, cut into chunks.
#pragma once

#include <algorithm>
#include <cstdint>

namespace treedecode::cpu {

// Columns of `chunks`.
inline constexpr int64_t kChunkColumns = 6;

// Attention adds up the keys of one segment one after the other and segments separately, so where they are cut decides
// about rounding: at multiples of this many tokens, whatever else is in the batch. A multiple of every tile of keys.
inline constexpr int64_t kSegment = 1024;

// The cost model, in whole numbers so that every implementation of the op plans alike. The unit is one packed row
// (query token x query head of a kv head) attending to one token.
inline constexpr int64_t kReadRows = 16;    // reading one token's K and V costs as much as this many packed rows
inline constexpr int64_t kPartTokens = 32;  // a packed row's partial costs as much as attending to this many tokens

// A flat plan's chunks are cut by cost. What is cut is the work of one kv head; the others repeat it.
inline constexpr int64_t kMaxLevels = 8;         // of shared nodes on a path, so that partial results have a bound
inline constexpr int64_t kTileRows = 128;        // packed rows of one work tile at most
inline constexpr int64_t kTilesPerWorker = 4;    // aimed at: enough for an even spread, few enough partial results
inline constexpr int64_t kMinChunkTokens = 128;  // shorter ones spend their time on latency and partial results
inline constexpr int64_t kChunkStep = 64;        // a multiple of every tile of keys
inline constexpr int64_t kNumClasses = 8;        // of cost, halving from one to the next, in which chunks are sorted

struct PlanTreeParams {
  const int32_t* page_table;  // [num_rows, max_pages], row stride table_stride
  const int32_t* seq_lens;    // [num_rows]
  const int32_t* q_lens;      // [num_rows], or null: 1 each
  int32_t* q_indptr;          // [num_rows + 1]
  int32_t* part_indptr;       // [num_rows + 1]
  int32_t* chunks;            // [max_chunks, 6] row_begin, row_end, token_begin, token_end, then
                              //   chained: segment, round; flat: part, tiles of the chunks before
  int32_t* counts;  // [6] num_chunks, num_parts, unique_tokens, path_tokens, page_size, num_tiles (0: chained)
  int64_t num_rows;
  int64_t max_pages;
  int64_t table_stride;  // elements
  int64_t page_size;
  int64_t group_size;  // num_qo_heads / num_kv_heads
  int64_t workers;     // that share the work of one kv head; 0: a chained plan
};

// Worst case over all page tables of this shape: a forest with B leaves has at most 2B - 1 nodes that hold tokens. A
// row's path crosses no more borders of segments than it has whole segments; a flat plan has no more cuts than tiles
// aimed at.
inline int64_t max_chunks(int64_t num_rows, int64_t max_pages, int64_t page_size, int64_t workers) {
  const int64_t cuts = workers ? kTilesPerWorker * workers : num_rows * (max_pages * page_size / kSegment);
  return std::max<int64_t>(0, 2 * num_rows - 1) + (num_rows ? cuts : 0);
}

// shared[row] = number of leading pages that rows row - 1 and row share, for rows in [row_begin, row_end); shared[0] =
// 0. Rows are independent, so the ranges may be computed in parallel.
void common_pages(const PlanTreeParams& p, int32_t* shared, int64_t row_begin, int64_t row_end);  // [num_rows]

// Writes the plan. False, with q_indptr and so on half written, if a count does not fit an int32.
bool plan_tree(const PlanTreeParams& p, const int32_t* shared);  // [num_rows]

}  // namespace treedecode::cpu
