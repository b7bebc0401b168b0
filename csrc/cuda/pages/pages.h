// Page ops on the device: fork, append, hold and adopt on the page state, as csrc/cpu/pages.h defines them.
//
// One block runs a call in phases: check, count, commit. Where the CPU op raises an exception, the device op sets the
// status to kBadArgument, and nothing else changes. Results do not depend on the order in which threads run: where the
// CPU goes by the order of rows, the device goes by row numbers.
#pragma once

#include <cstdint>

#include "../../cpu/page_status.h"
#include "../common/runtime.h"

namespace treedecode::cuda {

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
};

struct ForkParams {
  PageState state;
  const int32_t* src;   // [n]
  const int32_t* dst;   // [n]
  const int32_t* lens;  // [n] or nullptr: the whole source
  int64_t n;
  uint64_t* last_drops;  // [num_pages] scratch
  int32_t* row_marks;    // [max_branches] scratch
  int32_t* new_rows;     // [n, max_pages] scratch
  int32_t* new_lens;     // [n] scratch
  int32_t* num_freed;    // [n] scratch
};

struct AppendParams {
  PageState state;
  const int32_t* rows;    // [n]
  const int32_t* q_lens;  // [n] or nullptr: 1 each
  int64_t* slots;         // [num_slots] out
  int32_t* copy_src;      // [n] out, the first *num_copies: copies of partial pages that the caller must do
  int32_t* copy_dst;      // [n] out
  int32_t* copy_tokens;   // [n] out
  int32_t* num_copies;    // [1] out
  int64_t n;
  int64_t num_slots;
  int64_t* first_slots;   // [n] scratch
  int32_t* first_pages;   // [n] scratch
  int32_t* copies;        // [n] scratch
  int32_t* row_marks;     // [max_branches] scratch
  int32_t* num_sharers;   // [num_pages] scratch
  int32_t* last_sharers;  // [num_pages] scratch
};

struct HoldParams {
  PageState state;       // page_table and seq_lens not used
  const int32_t* pages;  // [n]
  int64_t n;
  bool hold;
  int32_t* num_drops;   // [num_pages] scratch
  int32_t* last_drops;  // [num_pages] scratch
};

struct AdoptParams {
  PageState state;       // free_pages not used
  const int32_t* pages;  // [n], n = ceil(num_tokens / page_size) <= max_pages
  int64_t n;
  int64_t row;
  int64_t num_tokens;
};

cudaError_t fork_branches(const ForkParams& p, cudaStream_t stream);
cudaError_t append_slots(const AppendParams& p, cudaStream_t stream);
cudaError_t hold_pages(const HoldParams& p, cudaStream_t stream);
cudaError_t adopt_pages(const AdoptParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
