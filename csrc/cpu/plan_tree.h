// plan_tree: finds the rows that share pages, and cuts the shared pages into chunks. The layout of a plan and the costs
// by which it is cut are the same on the device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace treedecode::cpu {

// Head dimensions that attention takes: multiples of kHeadDimStep up to kMaxHeadDim.
inline constexpr int64_t kHeadDimStep = 8, kMaxHeadDim = 256;
constexpr bool is_head_dim(int64_t head_dim) {
  return head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kHeadDimStep == 0;
}

// A row of a chained plan's `chunks`, for the CPU. The rows have these tokens' pages in common. They are numbered in
// the plan's order: row i is branch order[i], which is that row of the page table.
struct ChainedChunk {
  int32_t row_begin;
  int32_t row_end;
  int32_t token_begin;
  int32_t token_end;
  int32_t segment;  // of the tokens
  int32_t round;    // 0: begins its segment; r: continues a chunk of round r - 1
};

// A row of a flat plan's `chunks`, for a GPU.
struct FlatChunk {
  int32_t row_begin;
  int32_t row_end;
  int32_t token_begin;
  int32_t token_end;
  int32_t part;        // index of the partial result on the path
  int32_t tile_begin;  // number of work tiles of the chunks before
};
static_assert(sizeof(ChainedChunk) == sizeof(FlatChunk));

struct PlanCounts {
  int32_t num_chunks;     // -1: no plan, because a count does not fit an int32
  int32_t num_parts;      // partial results
  int32_t unique_tokens;  // tokens that are read, each once
  int32_t path_tokens;    // tokens that rows with queries would read without sharing
  int32_t page_size;
  int32_t num_tiles;  // 0: a chained plan
};

inline constexpr int64_t kChunkColumns = sizeof(FlatChunk) / sizeof(int32_t);
inline constexpr int64_t kNumCounts = sizeof(PlanCounts) / sizeof(int32_t);

// Tokens of a segment. Attention adds up the keys of one segment one after the other, and each segment separately, so
// the borders of segments decide about rounding: they are at multiples of kSegment, whatever else is in the batch. A
// multiple of every tile of keys.
inline constexpr int64_t kSegment = 1024;

// The cost model, in whole numbers, so that every implementation of the op makes the same plan. The unit is one packed
// row (query token x query head of a kv head) attending to one token.
inline constexpr int64_t kReadRows = 16;    // reading one token's K and V costs as much as this many packed rows
inline constexpr int64_t kPartTokens = 32;  // a packed row's partial costs as much as attending to this many tokens

// A flat plan's chunks are cut by cost, which is that of one kv head. A tile costs as much as it has tokens, however
// many rows it has, because reading the tokens takes longer than computing 128 rows.
inline constexpr int64_t kMaxLevels = 8;       // of shared nodes on a path, which bounds the number of partial results
inline constexpr int64_t kTileRows = 128;      // packed rows of one work tile at most
inline constexpr int64_t kTilesPerWorker = 4;  // the aim: enough to balance the load
inline constexpr int64_t kMinChunkTokens = 128;  // shorter chunks are dominated by latency
inline constexpr int64_t kRowTokens = 4;         // tokens of a chunk for each row of its tiles: a partial result
                                                 // (fp32, written and read) is as many bytes as two tokens (16 bit)
inline constexpr int64_t kChunkStep = 64;        // a multiple of every tile of keys
inline constexpr int64_t kNumClasses = 8;        // classes of cost that chunks are sorted by

// Returns how many tokens a chunk should have at least, of a node with so many packed rows. `target` is the cost of a
// chunk that balances the load, which matters more than few partial results.
constexpr int64_t chunk_tokens(int64_t rows, int64_t target) {
  const int64_t by_rows = std::min(kRowTokens * std::min(rows, kTileRows), 2 * target);
  return std::max({kMinChunkTokens, target, by_rows});
}

// Returns the class of tiles of this cost. Class 0 is for more than 2 * target, and each next class goes down to 3/4 or
// 2/3 of the one before.
constexpr int size_class(int64_t cost, int64_t target) {
  int i = 0;
  while (i < kNumClasses - 1 && cost << (i + 1) / 2 <= (i % 2 ? 3 : 2) * target) ++i;
  return i;
}

struct PlanTreeParams {
  const int32_t* page_table;  // [num_rows, max_pages], row stride table_stride
  const int32_t* seq_lens;    // [num_rows]
  const int32_t* q_lens;      // [num_rows], or null: 1 each
  int32_t* q_indptr;          // [num_rows + 1]
  int32_t* part_indptr;       // [num_rows + 1]
  int32_t* order;             // [num_rows] branches, in the order in which the plan takes them
  int32_t* row_indptr;        // [num_rows + 1] query tokens before each of them
  int32_t* chunks;            // [max_chunks, kChunkColumns] of ChainedChunk or FlatChunk
  PlanCounts* counts;         // [1]
  int64_t num_rows;
  int64_t max_pages;
  int64_t table_stride;  // elements
  int64_t page_size;
  int64_t group_size;  // num_qo_heads / num_kv_heads
  int64_t workers;     // thread blocks that share the work of one kv head; 0: a chained plan
};

// Returns the largest number of chunks over all page tables of this shape. A forest with B leaves has at most 2B - 1
// nodes that hold tokens. The path of a row crosses at most as many borders of segments as it has whole segments; a
// flat plan has at most kTilesPerWorker cuts for each worker.
inline int64_t max_chunks(int64_t num_rows, int64_t max_pages, int64_t page_size, int64_t workers) {
  const int64_t cuts = workers ? kTilesPerWorker * workers : num_rows * (max_pages * page_size / kSegment);
  return std::max<int64_t>(0, 2 * num_rows - 1) + (num_rows ? cuts : 0);
}

// Writes the plan of the rows in p.order, which share the pages that common_pages of row_order.h found. Returns false,
// with the outputs half written, if a count does not fit an int32.
bool plan_tree(const PlanTreeParams& p, const int32_t* shared);  // [num_rows]

}  // namespace treedecode::cpu
