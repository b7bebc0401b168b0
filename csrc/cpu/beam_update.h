// beam_update: one step of beam search after pruning. Sorts candidates into the running and the finished beams.
#pragma once

#include <cstdint>

namespace treedecode::cpu {

struct BeamUpdateParams {
  const float* scores;            // [num_groups, num_candidates] cumulative log-probs, descending; -inf = absent
  const int32_t* parent;          // [num_groups, num_candidates] row of the logits; -1 = absent
  const int32_t* token;           // [num_groups, num_candidates]
  const int32_t* row_indptr;      // [num_groups + 1] rows of the logits of each group
  const int32_t* beam_indptr;     // [num_groups + 1] beams of each group
  const int32_t* gen_lens;        // [num_groups] tokens generated before this step
  const int32_t* max_new_tokens;  // [num_groups]
  const int32_t* eos_ids;         // [num_eos]
  const bool* stop;               // [num_groups, num_candidates] candidates that end for another reason, or null
  float* pool_scores;             // [num_beams] finished beams, descending within a group
  int32_t* pool_lens;             // [num_beams] generated tokens incl. EOS; 0 = free
  int32_t* pool_parents;          // [num_beams] beam within the group whose history the last token continues
  int32_t* pool_tokens;           // [num_beams] last token
  bool* done;                     // [num_groups]
  float* running_scores;          // [num_beams]
  int32_t* running_parent;        // [num_beams] row of the logits
  int32_t* running_token;         // [num_beams]
  int64_t num_candidates;
  int64_t num_eos;
  double length_penalty;
  int32_t early_stopping;  // 0 = heuristic, 1 = a full pool is final, 2 = never stop while a better beam is possible
};

// Returns how many of a group's candidates count: enough for num_beams running beams even if all EOS tokens are the
// best.
static inline int64_t beam_candidates(int64_t num_beams, int64_t num_eos) {
  return (num_eos < 1 ? 2 : 1 + num_eos) * num_beams;
}

// Compares and copies a few numbers, so one build serves every ISA.
void beam_update(const BeamUpdateParams& p, int64_t group_begin, int64_t group_end);

}  // namespace treedecode::cpu
