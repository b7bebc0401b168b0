// Page ops: fork, append, hold, adopt on the page state, and the copy of pages over all layers.
//
// Every op runs in phases: check, count, commit. Check and count only read, and commit cannot fail, so an op that is
// refused has written nothing. Each phase is a loop over rows, as in the device kernels of one block. The caller's
// thread does the bookkeeping (a few thousand integers); only page copies are spread over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "page_status.h"
#include "strides.h"

namespace treedecode::cpu {

struct PageState {
  int32_t* refcount;    // [num_pages] references from page-table rows and from holders
  int32_t* free_pages;  // [num_pages] stack of free page ids; entries from num_free on are undefined
  int32_t* page_table;  // [max_branches, max_pages] entries from ceil(seq_len / page_size) on are undefined
  int32_t* seq_lens;    // [max_branches]
  PageStatus* status;   // [1]
  int64_t num_pages;
  int64_t max_branches;
  int64_t max_pages;
  int64_t page_size;

  int64_t pages_of(int64_t num_tokens) const { return (num_tokens + page_size - 1) / page_size; }
};

// A refused argument; argument == nullptr means none.
struct Fault {
  const char* argument = nullptr;
  const char* expected = nullptr;
  int64_t limit = 0;
  int64_t got = 0;
  int64_t index = 0;
};

struct ForkParams {
  const int32_t* src;   // [n]
  const int32_t* dst;   // [n]
  const int32_t* lens;  // [n] or nullptr: the whole source
  int64_t n;
};

struct AppendParams {
  const int32_t* rows;    // [n]
  const int32_t* q_lens;  // [n] or nullptr: 1 each
  int64_t* slots;         // [num_slots] out
  int64_t n;
  int64_t num_slots;
};

// Copies of partial pages that the caller of an append must do.
struct PageCopies {
  std::vector<int32_t> src;
  std::vector<int32_t> dst;
  std::vector<int32_t> num_tokens;
};

struct CopyPagesParams {
  char* kv;                   // [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim], a page contiguous
  const int32_t* src;         // [n]
  const int32_t* dst;         // [n]; negative = skip
  const int32_t* num_tokens;  // [n] or nullptr: whole pages
  int64_t n;
  int64_t num_planes;  // num_layers * 2
  int64_t num_kv_heads;
  int64_t head_bytes;   // page_size * head_dim * element size
  int64_t token_bytes;  // head_dim * element size
  CacheStride stride_bytes;
};

Fault fork_branches(const PageState& s, const ForkParams& p);
// Lack of pages is no fault: it sets the status to kOutOfPages, the slots are -1 and `copies` is empty.
Fault append_slots(const PageState& s, const AppendParams& p, PageCopies& copies);
Fault hold_pages(const PageState& s, const int32_t* pages /* [n] */, int64_t n, bool hold);
// The caller has checked that the row exists, and that num_tokens end in the last of n <= max_pages pages.
Fault adopt_pages(const PageState& s, int64_t row, const int32_t* pages /* [n] */, int64_t n, int64_t num_tokens);
// Work items are (plane, copy), plane-major: [begin, end) of num_planes * n.
void copy_pages(const CopyPagesParams& p, int64_t begin, int64_t end);

}  // namespace treedecode::cpu
