// beam_prune on the device: log-softmax and the best candidates of every group of rows, in one read of the logits.
//
// scan   a block per (row, chunk of the vocabulary): sum of exponentials and the chunk's best candidates
// merge  a block per row: lse, scores, the row's candidates in order; the last row of a group merges the group
//
// A row with NaN or +inf gets lse NaN. A group gets scores NaN, parent -1 and token -1 if it has such a row, NaN or
// +inf among its cum_logprobs, or invalid offsets.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/runtime.h"
#include "logits.h"

namespace treedecode::cuda {

// Sums of a chunk of a row.
struct BeamPruneChunkSums {
  float max;
  float sum;  // of exp(x - max)
};

struct BeamPruneParams {
  LogitsParams logits;
  const float* cum_logprobs;       // [rows]
  const int32_t* group_indptr;     // [num_groups + 1]
  float* scores;                   // [num_groups, k] out
  int32_t* parent;                 // [num_groups, k] out
  int32_t* token;                  // [num_groups, k] out
  float* lse;                      // [rows] out
  BeamPruneChunkSums* chunk_sums;  // [rows, num_chunks] scratch
  uint64_t* chunk_keys;            // [rows, num_chunks, slot_len] scratch: (logit, token) keys of each chunk's best
  uint64_t* row_keys;              // [rows, row_k] scratch: (score, rank in the group) keys
  int32_t* row_tokens;             // [rows, row_k] scratch
  uint64_t* row_sort;              // [rows, row_sort_len] scratch
  uint64_t* group_sort;            // [num_groups, group_sort_len] scratch
  int32_t* tickets;                // [num_groups] scratch: rows merged so far
  int64_t num_groups;
  int64_t k;
  int64_t row_k;  // min(k, vocab), the most candidates that a row can give
  int64_t slot_len;
  int64_t row_sort_len;
  int64_t group_sort_len;
  bool is_logprobs;
};

// Keys that a chunk may store. Room for more than row_k, where they are few, saves a selection of the best row_k.
constexpr int64_t beam_prune_slot_len(int64_t row_k, int64_t chunk_len) {
  return std::min(row_k <= 128 ? 2 * row_k : row_k, chunk_len);
}

// Scratch keys needed to sort so many keys in global memory; 0 = they are sorted in shared memory.
int64_t beam_prune_sort_len(int64_t num_keys);

cudaError_t beam_prune(const BeamPruneParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
