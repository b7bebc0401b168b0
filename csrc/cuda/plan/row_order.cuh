// plan_tree's first two launches: they order the rows by their page ids, so that rows that share pages are neighbours.
#pragma once

#include <algorithm>

#include "../common/scans.cuh"
#include "plan_tree.h"

namespace treedecode::cuda {

inline constexpr int kOrderThreads = 256;

__device__ __forceinline__ int64_t ceil_quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Lengths of a branch, clamped to those that the CPU op takes.
__device__ inline int seq_len_of(const PlanTreeParams& p, int64_t branch) {
  const int64_t n = p.seq_lens[branch], capacity = p.max_pages * p.page_size;
  return static_cast<int>(n < 0 ? 0 : n > capacity ? capacity : n);
}
__device__ inline int q_len_of(const PlanTreeParams& p, int64_t branch) {
  const int n = p.q_lens ? p.q_lens[branch] : 1, seq_len = seq_len_of(p, branch);
  return n < 0 ? 0 : n > seq_len && seq_len > 0 ? seq_len : n;
}
__device__ inline int num_pages_of(const PlanTreeParams& p, int64_t branch) {
  return static_cast<int>(ceil_quotient(seq_len_of(p, branch), p.page_size));
}

__device__ inline uint64_t hash_of(int32_t page, int column) {
  uint64_t x = (static_cast<uint64_t>(static_cast<uint32_t>(page)) << 32 | static_cast<uint32_t>(column)) + 1;
  x *= 0x9E3779B97F4A7C15;
  x = (x ^ x >> 32) * 0xD6E8FEB86659FD93;
  return x ^ x >> 32;
}

// Writes hashes[branch, segment]: the sum over all pages of a branch up to the end of each full segment. A block
// handles one branch. Sums are equal where two branches begin with the same pages. Other branches have equal sums once
// in 2^64.
__global__ void __launch_bounds__(kOrderThreads) _hash_pages_kernel(const __grid_constant__ PlanTreeParams p) {
  ptx::launch_next_kernel();  // the order, which waits for the hashes
  const int branch = static_cast<int>(ptx::block_x()), num_segments = num_pages_of(p, branch) / kHashPages;
  const int32_t* pages = p.page_table + branch * p.table_stride;
  uint64_t* hashes = p.hashes + branch * num_hash_segments(p.max_pages);
  if (ptx::thread() == 0) p.order[branch] = -1;
  uint64_t before = 0;
  for (int first = 0; first < num_segments; first += kOrderThreads) {
    const int segment = first + ptx::thread();
    uint64_t sum = 0;
    if (segment < num_segments) {
#pragma unroll
      for (int i = 0; i < kHashPages; ++i) {
        const int column = segment * kHashPages + i;
        sum += hash_of(pages[column], column);
      }
    }
    const BlockScan<uint64_t> scan = block_scan(sum);
    if (segment < num_segments) hashes[segment] = (before + scan.before + sum) & p.hash_mask;
    before += scan.total;
  }
}

// Returns whether branch a comes before branch b. Hashes tell how far they are equal, up to a segment.
__device__ inline bool is_before(const PlanTreeParams& p, int a, int b) {
  const int a_pages = num_pages_of(p, a), b_pages = num_pages_of(p, b), both = std::min(a_pages, b_pages);
  const int64_t segments = num_hash_segments(p.max_pages);
  const uint64_t *a_hashes = p.hashes + a * segments, *b_hashes = p.hashes + b * segments;
  int equal = 0;
  for (int end = both / kHashPages; equal < end;) {
    const int middle = equal + (end - equal) / 2;
    if (a_hashes[middle] == b_hashes[middle]) equal = middle + 1;
    else end = middle;
  }
  const int32_t *a_table = p.page_table + a * p.table_stride, *b_table = p.page_table + b * p.table_stride;
#pragma unroll
  for (int i = 0; i < kHashPages; ++i) {
    const int column = equal * static_cast<int>(kHashPages) + i;
    if (column >= both) break;
    const int32_t a_page = a_table[column], b_page = b_table[column];
    if (a_page != b_page) return a_page < b_page;
  }
  return a_pages != b_pages ? a_pages < b_pages : a < b;
}

// Writes order[i]: the branch that i others come before. A block handles one branch. Where hashes collide, an entry may
// stay -1.
__global__ void __launch_bounds__(kOrderThreads) _order_rows_kernel(const __grid_constant__ PlanTreeParams p) {
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  const int branch = static_cast<int>(ptx::block_x()), num_rows = static_cast<int>(p.num_rows);
  int before = 0;
  for (int other = ptx::thread(); other < num_rows; other += ptx::num_threads()) {
    if (other != branch) before += is_before(p, other, branch);
  }
  const BlockScan<int> scan = block_scan(before);
  if (ptx::thread() == 0) p.order[scan.total] = branch;
}

}  // namespace treedecode::cuda
