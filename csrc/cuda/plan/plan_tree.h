// plan_tree on the device: flat plans only.
#pragma once

#include <cstdint>

#include "../../cpu/plan_tree.h"
#include "../common/runtime.h"

namespace treedecode::cuda {

struct PlanTreeParams {
  const int32_t* page_table;  // [num_rows, max_pages], row stride table_stride
  const int32_t* seq_lens;    // [num_rows]
  const int32_t* q_lens;      // [num_rows], or null: 1 each
  int32_t* q_indptr;          // [num_rows + 1]
  int32_t* part_indptr;       // [num_rows + 1]
  int32_t* order;             // [num_rows]
  int32_t* row_indptr;        // [num_rows + 1]
  cpu::FlatChunk* chunks;     // [max_chunks]
  cpu::PlanCounts* counts;    // [1]
  int32_t* scratch;           // [plan_scratch(num_rows, max_pages)]
  uint64_t* hashes;           // [num_rows, num_hash_segments(max_pages)]
  int64_t num_rows;
  int64_t max_pages;
  int64_t table_stride;  // elements
  int64_t page_size;
  int64_t group_size;  // num_qo_heads / num_kv_heads
  int64_t workers;     // thread blocks that share the work of one kv head
  uint64_t hash_mask;  // all bits; tests take fewer, to see what collisions do
};

// Page ids that one hash covers.
inline constexpr int64_t kHashPages = 16;
constexpr int64_t num_hash_segments(int64_t max_pages) { return max_pages / kHashPages; }

// Page ids of a row that one block compares with those of the row before.
inline constexpr int64_t kPageSegment = 2048;
constexpr int64_t num_page_segments(int64_t max_pages) { return (max_pages + kPageSegment - 1) / kPageSegment; }

// Memory for the tree of one block's TreePlanner: shared memory up to kSharedRows rows, scratch for more.
inline constexpr int64_t kSharedRows = 1024;
inline int64_t tree_words(int64_t num_rows) {
  int64_t width = 1;
  while (width < num_rows + 1) width *= 2;
  return 4 * width + 20 * num_rows + 2;
}
inline int64_t plan_scratch(int64_t num_rows, int64_t max_pages) {
  return num_rows * num_page_segments(max_pages) + (num_rows > kSharedRows ? tree_words(num_rows) : 0);
}

// Lengths that the CPU op refuses are clamped to valid ones. num_chunks is -1 if a count does not fit an int32.
cudaError_t plan_tree(const PlanTreeParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
