// Kernels of the page ops, one block each. A warp handles a row of the page table, a thread anything else. Loops that
// only read the state end in a barrier that tells whether any thread has found an error; the state is written after the
// last of these barriers.
#pragma once

#include "../common/collectives.cuh"
#include "pages.h"

namespace treedecode::cuda {

inline constexpr int kMaxPageThreads = 1024;

namespace pages {

__device__ __forceinline__ bool is_row(const PageState& s, int32_t row) { return row >= 0 && row < s.max_branches; }
__device__ __forceinline__ bool is_page(const PageState& s, int32_t page) { return page >= 0 && page < s.num_pages; }
__device__ __forceinline__ int64_t max_len(const PageState& s) {
  const int64_t len = s.max_pages * s.page_size;
  return len < INT32_MAX ? len : INT32_MAX;
}
__device__ __forceinline__ bool is_len(const PageState& s, int32_t len) { return len >= 0 && len <= max_len(s); }
__device__ __forceinline__ bool has_error(const PageState& s) { return s.status->error != kOk; }
__device__ __forceinline__ bool bad_num_free(const PageState& s) {
  return s.status->num_free < 0 || s.status->num_free > s.num_pages;
}
__device__ __forceinline__ void refuse(const PageState& s) {
  if (ptx::thread() == 0) s.status->error = kBadArgument;
}

// 32-bit arithmetic: lengths are int32 in the state, and page_size is at most 2^31 - 1.
__device__ __forceinline__ int32_t pages_of(const PageState& s, int32_t num_tokens) {
  const auto page_size = static_cast<uint32_t>(s.page_size);
  return static_cast<int32_t>((static_cast<uint32_t>(num_tokens) + page_size - 1) / page_size);
}
__device__ __forceinline__ int32_t* row_of(const PageState& s, int32_t row) { return s.page_table + row * s.max_pages; }

// One destination row of a fork: its pages before and after.
struct Fork {
  int32_t* old;         // [num_old]
  const int32_t* next;  // [num_new]
  int32_t num_old;
  int32_t num_new;
  uint64_t index;

  __device__ Fork(const ForkParams& p, int i)
      : old(row_of(p.state, p.dst[i])),
        next(p.new_rows + i * p.state.max_pages),
        num_old(pages_of(p.state, p.state.seq_lens[p.dst[i]])),
        num_new(pages_of(p.state, p.new_lens[i])),
        index(static_cast<uint64_t>(i)) {}

  // Entries that stay as they are (a common prefix, when beams are reordered) need no reference counting.
  __device__ bool drops(int j) const { return j >= num_new || old[j] != next[j]; }
  // Orders all references that a fork drops: by row, and the last page of a row first.
  __device__ uint64_t drop_key(int j) const { return index << 32 | static_cast<uint32_t>(num_old - 1 - j); }
  // True if the row drops the last reference to its page j, which then goes on the free stack.
  __device__ bool frees(const ForkParams& p, int j) const {
    return drops(j) && p.state.refcount[old[j]] == 0 && p.last_drops[old[j]] == drop_key(j);
  }
};

}  // namespace pages

__global__ void __launch_bounds__(kMaxPageThreads, 1) _fork_branches_kernel(const __grid_constant__ ForkParams p) {
  using namespace pages;
  const PageState& s = p.state;
  if (has_error(s)) return;
  const int n = static_cast<int>(p.n), num_warps = ptx::num_threads() / ptx::kWarpSize;
  const int32_t num_free = s.status->num_free;
  bool bad = bad_num_free(s);
  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    if (is_row(s, p.src[i]) && is_row(s, p.dst[i])) p.row_marks[p.dst[i]] = 0;
    else bad = true;
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);

  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    bad |= ptx::atomic_add(&p.row_marks[p.dst[i]], 1) > 0;
    const int32_t src_len = s.seq_lens[p.src[i]], len = p.lens ? p.lens[i] : src_len;
    bad |= !is_len(s, src_len) || !is_len(s, s.seq_lens[p.dst[i]]) || len < 0 || len > src_len;
    p.new_lens[i] = len;
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);

  // New rows are read in full before any row is written: src and dst may overlap in any way.
  for (int i = ptx::warp(); i < n; i += num_warps) {
    const Fork f(p, i);
    const int32_t* from = row_of(s, p.src[i]);
    int32_t* next = p.new_rows + i * s.max_pages;
    for (int j = ptx::lane(); j < f.num_new; j += ptx::kWarpSize) {
      next[j] = from[j];
      bad |= !is_page(s, next[j]);
    }
    for (int j = ptx::lane(); j < f.num_old; j += ptx::kWarpSize) {
      if (is_page(s, f.old[j])) p.last_drops[f.old[j]] = 0;
      else bad = true;
    }
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);

  for (int i = ptx::warp(); i < n; i += num_warps) {
    const Fork f(p, i);
    for (int j = ptx::lane(); j < f.num_new; j += ptx::kWarpSize) {
      if (j >= f.num_old || f.drops(j)) ptx::atomic_add(&s.refcount[f.next[j]], 1);
    }
    for (int j = ptx::lane(); j < f.num_old; j += ptx::kWarpSize) {
      if (!f.drops(j)) continue;
      ptx::atomic_add(&s.refcount[f.old[j]], -1);
      ptx::atomic_max(&p.last_drops[f.old[j]], f.drop_key(j));
    }
  }
  ptx::sync_threads();

  for (int i = ptx::warp(); i < n; i += num_warps) {
    const Fork f(p, i);
    int32_t num_freed = 0;
    for (int j = f.num_old - 1 - ptx::lane(); j >= 0; j -= ptx::kWarpSize) num_freed += f.frees(p, j);
    num_freed = warp_sum(num_freed);
    if (ptx::lane() == 0) p.num_freed[i] = num_freed;
  }
  ptx::sync_threads();

  int32_t all_freed = 0;
  for (int first = 0; first < n; first += ptx::num_threads()) {
    const int i = first + ptx::thread();
    const BlockScan<int32_t> scan = block_scan(i < n ? p.num_freed[i] : 0);
    if (i < n) p.num_freed[i] = all_freed + scan.before;  // from here on the number of the rows before
    all_freed += scan.total;
  }
  ptx::sync_threads();

  for (int i = ptx::warp(); i < n; i += num_warps) {
    const Fork f(p, i);
    int64_t stack_len = num_free + p.num_freed[i];
    for (int first = f.num_old - 1; first >= 0; first -= ptx::kWarpSize) {
      const int j = first - ptx::lane();
      const bool freed = j >= 0 && f.frees(p, j);
      const uint32_t lanes = ptx::ballot(freed);
      const int64_t position = stack_len + ptx::popc(lanes & ((1u << ptx::lane()) - 1));
      if (freed && position < s.num_pages) s.free_pages[position] = f.old[j];
      stack_len += ptx::popc(lanes);
    }
    ptx::sync_warp();  // all lanes have read the row and its length
    for (int j = ptx::lane(); j < f.num_new; j += ptx::kWarpSize) f.old[j] = f.next[j];
    if (ptx::lane() == 0) s.seq_lens[p.dst[i]] = p.new_lens[i];
  }
  if (ptx::thread() == 0) s.status->num_free = num_free + all_freed;
}

namespace pages {

__device__ __forceinline__ void fill_no_slots(const AppendParams& p, int64_t begin = 0) {
  for (int64_t i = begin + ptx::thread(); i < p.num_slots; i += ptx::num_threads()) p.slots[i] = -1;
}

__device__ __forceinline__ int32_t q_len(const AppendParams& p, int i) { return p.q_lens ? p.q_lens[i] : 1; }

// Returns the partial last page that row i appends to, -1 for none.
__device__ __forceinline__ int32_t partial_page(const AppendParams& p, int i) {
  const int32_t len = p.state.seq_lens[p.rows[i]];
  const auto page_size = static_cast<int32_t>(p.state.page_size);
  return q_len(p, i) == 0 || len % page_size == 0 ? -1 : row_of(p.state, p.rows[i])[len / page_size];
}

// True if row i copies its partial last page. Rows that share one all copy it, except the last row if all sharers are
// in this call: that one writes in place.
__device__ __forceinline__ bool copies_page(const AppendParams& p, int i) {
  const int32_t page = partial_page(p, i);
  if (page < 0) return false;
  const int32_t num_references = p.state.refcount[page];
  return num_references > 1 && !(num_references <= p.num_sharers[page] && p.last_sharers[page] == i);
}

}  // namespace pages

__global__ void __launch_bounds__(kMaxPageThreads, 1) _append_slots_kernel(const __grid_constant__ AppendParams p) {
  using namespace pages;
  const PageState& s = p.state;
  const int n = static_cast<int>(p.n), num_warps = ptx::num_threads() / ptx::kWarpSize;
  const auto page_size = static_cast<int32_t>(s.page_size);
  if (ptx::thread() == 0) *p.num_copies = 0;
  if (has_error(s)) return fill_no_slots(p);
  const auto refuse_all = [&] {
    refuse(s);
    fill_no_slots(p);
  };
  const int32_t num_free = s.status->num_free;
  bool bad = bad_num_free(s);
  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    if (is_row(s, p.rows[i])) p.row_marks[p.rows[i]] = 0;
    else bad = true;
  }
  if (ptx::sync_threads_or(bad)) return refuse_all();

  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    const int32_t len = s.seq_lens[p.rows[i]];
    bad |= ptx::atomic_add(&p.row_marks[p.rows[i]], 1) > 0;
    if (!is_len(s, len) || q_len(p, i) < 0 || q_len(p, i) > max_len(s) - len) {
      bad = true;
      continue;
    }
    const int32_t page = partial_page(p, i);
    if (is_page(s, page)) {
      p.num_sharers[page] = 0;
      p.last_sharers[page] = 0;
    } else if (q_len(p, i) > 0 && len % page_size != 0) {
      bad = true;
    }
  }
  if (ptx::sync_threads_or(bad)) return refuse_all();

  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    const int32_t page = partial_page(p, i);
    if (page < 0) continue;
    ptx::atomic_add(&p.num_sharers[page], 1);
    ptx::atomic_max(&p.last_sharers[page], i);
  }
  ptx::sync_threads();

  int64_t num_needed = 0, num_slots = 0;
  int32_t num_copies = 0;
  for (int first = 0; first < n; first += ptx::num_threads()) {
    const int i = first + ptx::thread();
    const int32_t len = i < n ? s.seq_lens[p.rows[i]] : 0, num_new = i < n ? q_len(p, i) : 0;
    const bool copied = i < n && copies_page(p, i);
    const int64_t needed = pages_of(s, len + num_new) - pages_of(s, len) + copied;
    const BlockScan<int64_t> pages = block_scan(needed);
    const BlockScan<int64_t> slots = block_scan(static_cast<int64_t>(num_new));
    const BlockScan<int32_t> copies = block_scan(static_cast<int32_t>(copied));
    if (i < n) {
      p.first_pages[i] = static_cast<int32_t>(num_needed + pages.before);
      p.first_slots[i] = num_slots + slots.before;
      p.copies[i] = copied ? num_copies + copies.before : -1;
    }
    num_needed += pages.total;
    num_slots += slots.total;
    num_copies += copies.total;
  }
  if (num_slots > p.num_slots) return refuse_all();
  if (num_needed > num_free) {
    if (ptx::thread() == 0) {
      s.status->error = kOutOfPages;
      s.status->num_needed = static_cast<int32_t>(num_needed < INT32_MAX ? num_needed : INT32_MAX);
    }
    return fill_no_slots(p);
  }
  const int32_t* top = s.free_pages + num_free - 1;
  for (int k = ptx::thread(); k < num_needed; k += ptx::num_threads()) bad |= !is_page(s, top[-k]);
  if (ptx::sync_threads_or(bad)) return refuse_all();

  fill_no_slots(p, num_slots);
  // The k-th page that the call takes is the k-th from the top of the stack. Pages are taken in the order of rows and
  // of positions in a row; a copy comes first.
  for (int i = ptx::warp(); i < n; i += num_warps) {
    const int32_t row = p.rows[i], num_new = q_len(p, i), len = s.seq_lens[row], copy = p.copies[i];
    if (num_new == 0) continue;
    int32_t* table = row_of(s, row);
    const int32_t first = copy >= 0 ? len / page_size : pages_of(s, len), end = pages_of(s, len + num_new);
    const int32_t* taken = top - p.first_pages[i];                            // taken[0], taken[-1], ...
    const int32_t partial = first > len / page_size ? table[first - 1] : -1;  // page that is written in place
    if (copy >= 0 && ptx::lane() == 0) {
      p.copy_src[copy] = table[first];
      p.copy_dst[copy] = taken[0];
      p.copy_tokens[copy] = len % page_size;
      ptx::atomic_add(&s.refcount[table[first]], -1);
    }
    for (int j = first + ptx::lane(); j < end; j += ptx::kWarpSize) {
      table[j] = taken[first - j];
      s.refcount[taken[first - j]] = 1;
    }
    int64_t* slots = p.slots + p.first_slots[i];
    for (int t = ptx::lane(); t < num_new; t += ptx::kWarpSize) {
      const int32_t j = (len + t) / page_size;
      const int64_t page = j < first ? partial : taken[first - j];
      slots[t] = page * page_size + (len + t - j * page_size);
    }
    ptx::sync_warp();  // all lanes have read the length
    if (ptx::lane() == 0) s.seq_lens[row] = len + num_new;
  }
  if (ptx::thread() != 0) return;
  *p.num_copies = num_copies;
  const auto remaining = static_cast<int32_t>(num_free - num_needed);
  const int32_t used = static_cast<int32_t>(s.num_pages) - remaining;
  s.status->num_free = remaining;
  if (used > s.status->peak_used) s.status->peak_used = used;
}

__global__ void __launch_bounds__(kMaxPageThreads, 1) _hold_pages_kernel(const __grid_constant__ HoldParams p) {
  using namespace pages;
  const PageState& s = p.state;
  if (has_error(s)) return;
  const int n = static_cast<int>(p.n);
  const int32_t num_free = s.status->num_free;
  bool bad = bad_num_free(s);
  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    const int32_t page = p.pages[i];
    if (!is_page(s, page)) {
      bad = true;
    } else if (p.hold) {
      bad |= s.refcount[page] < 1;
    } else {
      p.num_drops[page] = 0;
      p.last_drops[page] = 0;
    }
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);
  if (p.hold) {
    for (int i = ptx::thread(); i < n; i += ptx::num_threads()) ptx::atomic_add(&s.refcount[p.pages[i]], 1);
    return;
  }
  for (int i = ptx::thread(); i < n; i += ptx::num_threads()) {
    bad |= ptx::atomic_add(&p.num_drops[p.pages[i]], 1) >= s.refcount[p.pages[i]];
    ptx::atomic_max(&p.last_drops[p.pages[i]], i);
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);

  int32_t all_freed = 0;
  for (int first = 0; first < n; first += ptx::num_threads()) {
    const int i = first + ptx::thread();
    bool freed = false;
    if (i < n && p.last_drops[p.pages[i]] == i) {  // one thread for each page
      int32_t& refcount = s.refcount[p.pages[i]];
      refcount -= p.num_drops[p.pages[i]];
      freed = refcount == 0;
    }
    const BlockScan<int32_t> scan = block_scan(static_cast<int32_t>(freed));
    const int64_t position = static_cast<int64_t>(num_free) + all_freed + scan.before;
    if (freed && position < s.num_pages) s.free_pages[position] = p.pages[i];
    all_freed += scan.total;
  }
  if (ptx::thread() == 0) s.status->num_free = num_free + all_freed;
}

__global__ void __launch_bounds__(kMaxPageThreads, 1) _adopt_pages_kernel(const __grid_constant__ AdoptParams p) {
  using namespace pages;
  const PageState& s = p.state;
  if (has_error(s)) return;
  const auto row = static_cast<int32_t>(p.row);
  bool bad = bad_num_free(s) || s.seq_lens[row] != 0;
  for (int64_t j = ptx::thread(); j < p.n; j += ptx::num_threads()) {
    bad |= !is_page(s, p.pages[j]) || s.refcount[p.pages[j]] < 1;
  }
  if (ptx::sync_threads_or(bad)) return refuse(s);
  for (int64_t j = ptx::thread(); j < p.n; j += ptx::num_threads()) {
    ptx::atomic_add(&s.refcount[p.pages[j]], 1);
    row_of(s, row)[j] = p.pages[j];
  }
  if (ptx::thread() == 0) s.seq_lens[row] = static_cast<int32_t>(p.num_tokens);
}

}  // namespace treedecode::cuda
