// plan_tree's first launch: compares the pages of each row with those of the row before.
#pragma once

#include <algorithm>

#include "../common/collectives.cuh"
#include "plan_tree.h"

namespace treedecode::cuda {

inline constexpr int kCompareThreads = 256;

__device__ __forceinline__ int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lengths of a row, clamped to those that the CPU op takes.
__device__ inline int seq_len_of(const PlanTreeParams& p, int64_t row) {
  const int64_t n = p.seq_lens[row], capacity = p.max_pages * p.page_size;
  return static_cast<int>(n < 0 ? 0 : n > capacity ? capacity : n);
}
__device__ inline int q_len_of(const PlanTreeParams& p, int64_t row) {
  const int n = p.q_lens ? p.q_lens[row] : 1, seq_len = seq_len_of(p, row);
  return n < 0 ? 0 : n > seq_len && seq_len > 0 ? seq_len : n;
}

// Number of pages that both row - 1 and row have.
__device__ inline int pages_in_both(const PlanTreeParams& p, int64_t row) {
  return static_cast<int>(ceil_quotient(std::min(seq_len_of(p, row - 1), seq_len_of(p, row)), p.page_size));
}

// Writes scratch[row, segment]: the first page of the segment that rows row - 1 and row do not share, or the segment's
// end. A block handles one segment of one row.
__global__ void __launch_bounds__(kCompareThreads) _compare_pages_kernel(const __grid_constant__ PlanTreeParams p) {
  ptx::launch_next_kernel();  // the plan, which waits for the results
  TD_SHARED(int, first, kCompareThreads / ptx::kWarpSize);
  const int64_t segments = num_page_segments(p.max_pages);
  const int64_t row = 1 + ptx::block_x() / segments, segment = ptx::block_x() % segments;
  const int end = static_cast<int>(std::min((segment + 1) * kPageSegment, static_cast<int64_t>(pages_in_both(p, row))));
  const int32_t* table = p.page_table + row * p.table_stride;
  int differs = end;
#pragma unroll
  for (int i = 0; i < kPageSegment / kCompareThreads; ++i) {
    const int page = static_cast<int>(segment * kPageSegment) + i * kCompareThreads + ptx::thread();
    if (page < end && table[page] != table[page - p.table_stride]) differs = std::min(differs, page);
  }
  differs = -warp_max(-differs);
  if (ptx::lane() == 0) first[ptx::warp()] = differs;
  ptx::sync_threads();
  if (ptx::thread() != 0) return;
  for (int warp = 1; warp < kCompareThreads / ptx::kWarpSize; ++warp) differs = std::min(differs, first[warp]);
  p.scratch[row * segments + segment] = differs;
}

}  // namespace treedecode::cuda
