// plan_tree's third launch: compares the pages of each row with those of the row before.
#pragma once

#include <algorithm>

#include "../common/collectives.cuh"
#include "row_order.cuh"

namespace treedecode::cuda {

inline constexpr int kCompareThreads = 256;

// The branch of a row; 0 where collisions of hashes left the row without one.
__device__ inline int branch_of(const PlanTreeParams& p, int64_t row) {
  const int branch = p.order[row];
  return branch < 0 ? 0 : branch;
}

// Number of pages that both row - 1 and row have.
__device__ inline int pages_in_both(const PlanTreeParams& p, int64_t row) {
  return std::min(num_pages_of(p, branch_of(p, row - 1)), num_pages_of(p, branch_of(p, row)));
}

// Writes scratch[row, segment]: the first page of the segment that rows row - 1 and row do not share, or the segment's
// end. A block handles one segment of one row.
__global__ void __launch_bounds__(kCompareThreads) _compare_pages_kernel(const __grid_constant__ PlanTreeParams p) {
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();  // the plan, which waits for the results
  TD_SHARED(int, first, kCompareThreads / ptx::kWarpSize);
  const int64_t segments = num_page_segments(p.max_pages);
  const int64_t row = 1 + ptx::block_x() / segments, segment = ptx::block_x() % segments;
  const int end = static_cast<int>(std::min((segment + 1) * kPageSegment, static_cast<int64_t>(pages_in_both(p, row))));
  const int32_t* before = p.page_table + branch_of(p, row - 1) * p.table_stride;
  const int32_t* table = p.page_table + branch_of(p, row) * p.table_stride;
  int differs = end;
#pragma unroll
  for (int i = 0; i < kPageSegment / kCompareThreads; ++i) {
    const int page = static_cast<int>(segment * kPageSegment) + i * kCompareThreads + ptx::thread();
    if (page < end && table[page] != before[page]) differs = std::min(differs, page);
  }
  differs = -warp_max(-differs);
  if (ptx::lane() == 0) first[ptx::warp()] = differs;
  ptx::sync_threads();
  if (ptx::thread() != 0) return;
  for (int warp = 1; warp < kCompareThreads / ptx::kWarpSize; ++warp) differs = std::min(differs, first[warp]);
  p.scratch[row * segments + segment] = differs;
}

}  // namespace treedecode::cuda
