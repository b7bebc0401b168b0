// plan_tree: finds the rows that share pages, and cuts what they share into chunks. What a plan consists of, and the
// costs by which it is cut, are the same on the device.
#pragma once

#include <algorithm>
#include <cstdint>

namespace treedecode::cpu {

// Head dimensions that attention takes: multiples of kHeadDimStep up to kMaxHeadDim.
inline constexpr int64_t kHeadDimStep = 8, kMaxHeadDim = 256;
constexpr bool is_head_dim(int64_t head_dim) {
  return head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kHeadDimStep == 0;
}

// A row of a chained plan's `chunks`, for the CPU. The rows of the page table have these tokens' pages in common.
struct ChainedChunk {
  int32_t row_begin;
  int32_t row_end;
  int32_t token_begin;
  int32_t token_end;
  int32_t segment;  // that the tokens are in
  int32_t round;    // 0: begins its segment; r: goes on from a chunk of round r - 1
};

// A row of a flat plan's `chunks`, for a GPU.
struct FlatChunk {
  int32_t row_begin;
  int32_t row_end;
  int32_t token_begin;
  int32_t token_end;
  int32_t part;        // number of the partial result on the path
  int32_t tile_begin;  // work tiles of the chunks before
};
static_assert(sizeof(ChainedChunk) == sizeof(FlatChunk));

struct PlanCounts {
  int32_t num_chunks;     // -1: a count does not fit an int32, and the plan is none
  int32_t num_parts;      // partial results
  int32_t unique_tokens;  // read once each
  int32_t path_tokens;    // that the rows with queries would read each for itself
  int32_t page_size;
  int32_t num_tiles;  // 0: a chained plan
};

inline constexpr int64_t kChunkColumns = sizeof(FlatChunk) / sizeof(int32_t);
inline constexpr int64_t kNumCounts = sizeof(PlanCounts) / sizeof(int32_t);

// Attention adds up the keys of one segment one after the other and segments separately, so where they are cut decides
// about rounding: at multiples of this many tokens, whatever else is in the batch. A multiple of every tile of keys.
inline constexpr int64_t kSegment = 1024;

// The cost model, in whole numbers so that every implementation of the op plans alike. The unit is one packed row
// (query token x query head of a kv head) attending to one token.
inline constexpr int64_t kReadRows = 16;    // reading one token's K and V costs as much as this many packed rows
inline constexpr int64_t kPartTokens = 32;  // a packed row's partial costs as much as attending to this many tokens

// A flat plan's chunks are cut by cost. What is cut is the work of one kv head; the others repeat it. A tile costs its
// tokens, whatever rows it has: it waits for them, as long as 128 rows take less than reading what they attend to.
inline constexpr int64_t kMaxLevels = 8;         // of shared nodes on a path, so that partial results have a bound
inline constexpr int64_t kTileRows = 128;        // packed rows of one work tile at most
inline constexpr int64_t kTilesPerWorker = 4;    // aimed at: enough for an even spread
inline constexpr int64_t kMinChunkTokens = 128;  // shorter ones spend their time on latency
inline constexpr int64_t kRowTokens = 4;         // tokens of a chunk for each row of its tiles: a partial result
                                                 // (fp32, written and read) is as many bytes as two tokens (16 bit)
inline constexpr int64_t kChunkStep = 64;        // a multiple of every tile of keys
inline constexpr int64_t kNumClasses = 8;        // of cost, in which chunks are sorted

// Tokens that a chunk should have at least, of a node with so many packed rows; `target` is the cost aimed at. That
// every worker has something to do is worth more than few partial results.
constexpr int64_t chunk_tokens(int64_t rows, int64_t target) {
  const int64_t of_rows = std::min(kRowTokens * std::min(rows, kTileRows), 2 * target);
  return std::max({kMinChunkTokens, target, of_rows});
}

// The class of tiles of this cost: the first one for more than 2 * target, and each next one down to 3/4 or 2/3 of the
// one before.
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
  int32_t* chunks;            // [max_chunks, kChunkColumns] of ChainedChunk or FlatChunk
  PlanCounts* counts;         // [1]
  int64_t num_rows;
  int64_t max_pages;
  int64_t table_stride;  // elements
  int64_t page_size;
  int64_t group_size;  // num_qo_heads / num_kv_heads
  int64_t workers;     // thread blocks that share the work of one kv head; 0: a chained plan
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

// Writes the plan. Returns false, with the outputs half written, if a count does not fit an int32.
bool plan_tree(const PlanTreeParams& p, const int32_t* shared);  // [num_rows]

}  // namespace treedecode::cpu
