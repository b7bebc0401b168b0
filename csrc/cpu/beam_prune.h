// beam_prune: log-softmax and the best candidates of every group of rows, in one read of the logits.
//
// scan   per (row, chunk of the vocabulary): sum of exponentials and the chunk's best candidates
// rank   per row: lse, scores, the row's candidates in order
// merge  per group: the best of its rows
// The chunks depend on the shapes alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace treedecode::cpu {

struct BeamPruneParams {
  const void* logits;           // [rows, vocab], unit stride along vocab
  const int32_t* token_mask;    // [rows, ceil(vocab / 32)] bit set = allowed, or nullptr
  const float* cum_logprobs;    // [rows]
  const int32_t* group_indptr;  // [num_groups + 1]
  float* scores;                // [num_groups, k] out
  int32_t* parent;              // [num_groups, k] out
  int32_t* token;               // [num_groups, k] out
  float* lse;                   // [rows] out
  uint64_t* chunk_keys;         // [rows, num_chunks, row_k] scratch: (logit, token) keys of each chunk's best
  int64_t* chunk_counts;        // [rows, num_chunks] scratch: number of chunk_keys; -1 = a bad logit
  float* chunk_refs;            // [rows, num_chunks] scratch: base of the exponentials
  double* chunk_sums;           // [rows, num_chunks] scratch: sum of exp(x - ref)
  uint64_t* row_keys;           // [rows, row_k] scratch: (score, rank in the group) keys
  int32_t* row_tokens;          // [rows, row_k] scratch
  int64_t* row_counts;          // [rows] scratch
  int64_t rows;
  int64_t vocab;
  int64_t num_groups;
  int64_t k;
  int64_t row_k;  // min(k, vocab), the most candidates that a row can give
  int64_t num_chunks;
  int64_t chunk_len;  // a multiple of 64
  int64_t logits_stride;
  int64_t mask_stride;
  DType dtype;
  bool is_logprobs;

  // Keys in the buffer of each worker (Candidates::buffer_len).
  int64_t buffer_len() const { return 2 * row_k + 128; }
};

void beam_prune_rank(const BeamPruneParams& p, int64_t row_begin, int64_t row_end);
void beam_prune_merge(const BeamPruneParams& p, int64_t group_begin, int64_t group_end, uint64_t* keys /* scratch */);

}  // namespace treedecode::cpu

// Scans work items [begin, end) of rows * num_chunks; buffer [buffer_len] and seeds [2048] are the worker's own.
TD_DECLARE_KERNEL(beam_prune_scan, void beam_prune_scan(const BeamPruneParams& p, int64_t begin, int64_t end,
                                                        uint64_t* buffer, uint64_t* seeds))
