// beam_update on the device: one step of beam search after pruning. Sorts candidates into the running and the finished
// beams.
//
// Each block has a group. A group with invalid lengths, offsets or candidates stays as it is; its running beams get
// score NaN, parent -1 and token -1.
#pragma once

#include <cstdint>

#include "../common/runtime.h"

namespace treedecode::cuda {

struct BeamUpdateParams {
  const float* scores;            // [num_groups, num_candidates] cumulative log-probs, descending; -inf = absent
  const int32_t* parent;          // [num_groups, num_candidates] row of the logits; -1 = absent
  const int32_t* token;           // [num_groups, num_candidates]
  const int32_t* row_indptr;      // [num_groups + 1] rows of the logits of each group
  const int32_t* beam_indptr;     // [num_groups + 1] beams of each group
  const int32_t* gen_lens;        // [num_groups] tokens generated before this step
  const int32_t* max_new_tokens;  // [num_groups]
  const int32_t* eos_ids;         // [num_eos]
  const bool* stop;         // [num_groups, num_candidates] true for candidates that end for another reason, or nullptr
  float* pool_scores;       // [num_beams] finished beams, descending within a group
  int32_t* pool_lens;       // [num_beams] generated tokens incl. EOS; 0 = free
  int32_t* pool_parents;    // [num_beams] beam within the group whose history the last token continues
  int32_t* pool_tokens;     // [num_beams] last token
  bool* done;               // [num_groups]
  float* running_scores;    // [num_beams] out
  int32_t* running_parent;  // [num_beams] out, row of the logits
  int32_t* running_token;   // [num_beams] out
  int32_t* lists;           // [num_groups, 3, num_candidates] scratch: open, ended, pool_ranks of BeamGroup
  int64_t num_groups;
  int64_t num_candidates;
  int64_t num_beams;
  int64_t num_eos;
  double length_penalty;
  int32_t early_stopping;  // 0 = heuristic, 1 = a full pool is final, 2 = never stop while a better beam is possible
};

cudaError_t beam_update(const BeamUpdateParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
