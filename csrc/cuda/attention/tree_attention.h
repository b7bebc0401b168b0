// tree_attention on the device: attention of many branches to the pages of a tree, by a flat plan.
#pragma once

#include <cstdint>

#include "../../cpu/dtypes.h"
#include "../../cpu/plan_tree.h"
#include "../../cpu/strides.h"
#include "../common/runtime.h"

namespace treedecode::cuda {

struct TreeAttentionParams {
  const void* q;                  // [num_q, num_qo_heads, head_dim], strides in q_stride
  const void* k_pages;            // [num_pages, page_size, num_kv_heads, head_dim], strides in k_stride
  const void* v_pages;            // same shape, strides in v_stride
  const int32_t* page_table;      // [num_rows, max_pages], row stride page_table_stride
  const int32_t* seq_lens;        // [num_rows]
  const int32_t* q_indptr;        // [num_rows + 1]
  const int32_t* part_indptr;     // [num_rows + 1]
  const int32_t* order;           // [num_rows] branches in the plan's order
  const int32_t* row_indptr;      // [num_rows + 1]
  const cpu::FlatChunk* chunks;   // [max_chunks]
  const cpu::PlanCounts* counts;  // [1]
  const float* sinks;             // [num_qo_heads] or null
  void* out;                      // [num_q, num_qo_heads, head_dim] contiguous, dtype
  float* lse;                     // [num_q, num_qo_heads] or null
  float* part_out;                // [max_parts, num_qo_heads, head_dim]
  float* part_lse;                // [max_parts, num_qo_heads] natural log
  int64_t num_q;
  int64_t num_rows;
  int64_t num_qo_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_pages;
  int64_t page_size;
  int64_t max_pages;
  int64_t max_chunks;
  int64_t max_parts;
  int64_t page_table_stride;
  TokenStride q_stride;  // in elements, as all strides
  PageStride k_stride;
  PageStride v_stride;
  int64_t window_left;  // < 0: unlimited
  int32_t group_size;   // num_qo_heads / num_kv_heads
  float soft_cap;       // 0: none
  // The weight of a key is 2^(score * scale), relative to the others; with a cap, the score is soft_cap * tanh(qk *
  // cap_scale) instead of qk.
  float scale;
  float cap_scale;
  DType dtype;
};

// Returns how many partial results a plan may have with `num_cuts` rows of chunks more than a forest of num_rows
// branches has nodes. A path has at most 8 shared nodes and the branch's own, and each cut of a node adds a part.
inline int64_t max_parts(int64_t num_q, int64_t num_cuts, int64_t group_size) {
  const int64_t everywhere = num_q * num_cuts, by_cost = cpu::kTileRows * num_cuts / group_size;
  return (cpu::kMaxLevels + 1) * num_q + (everywhere < by_cost ? everywhere : by_cost);
}

// Two launches: partial results, then their merge along each branch's path.
cudaError_t tree_attention(const TreeAttentionParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
