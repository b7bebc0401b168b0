#include "../cpu/beam_update.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "beam_update_args.h"
#include "parallel.h"

namespace treedecode {
namespace {

void check_indptr(const int32_t* indptr, const char* name, int64_t num_groups) {
  STD_TORCH_CHECK(indptr[0] == 0, "[ValueError] ", name, ": expected to start at 0, got ", indptr[0]);
  for (int64_t g = 0; g < num_groups; ++g) {
    STD_TORCH_CHECK(indptr[g] < indptr[g + 1], "[ValueError] ", name,
                    ": expected at least one row in every group, got ", indptr[g], " to ", indptr[g + 1], " for group ",
                    g);
  }
}

void check_groups(const cpu::BeamUpdateParams& p, int64_t num_groups, int64_t num_pool) {
  check_indptr(p.row_indptr, "row_indptr", num_groups);
  check_indptr(p.beam_indptr, "beam_indptr", num_groups);
  STD_TORCH_CHECK(p.beam_indptr[num_groups] == num_pool, "[ValueError] beam_indptr: expected to end at ", num_pool,
                  ", the size of the pool, got ", p.beam_indptr[num_groups]);
  for (int64_t g = 0; g < num_groups; ++g) {
    if (p.done[g]) continue;
    const int64_t need = cpu::beam_candidates(p.beam_indptr[g + 1] - p.beam_indptr[g], p.num_eos);
    STD_TORCH_CHECK(need <= p.num_candidates,
                    "[ValueError] scores: expected at least max(2, 1 + num_eos) * num_beams = ", need,
                    " candidates for group ", g, ", got ", p.num_candidates);
    STD_TORCH_CHECK(p.gen_lens[g] >= 0 && p.gen_lens[g] < p.max_new_tokens[g],
                    "[ValueError] gen_lens: expected 0 <= gen_lens < max_new_tokens = ", p.max_new_tokens[g], ", got ",
                    p.gen_lens[g], " for group ", g);
    const float* scores = p.scores + g * p.num_candidates;
    const int32_t* parent = p.parent + g * p.num_candidates;
    for (int64_t i = 0; i < need; ++i) {
      STD_TORCH_CHECK(i == 0 ? scores[i] == scores[i] : scores[i - 1] >= scores[i],
                      "[ValueError] scores: expected descending numbers, got ", i ? scores[i - 1] : scores[i],
                      " before ", scores[i], " in group ", g);
      STD_TORCH_CHECK(parent[i] == -1 || (p.row_indptr[g] <= parent[i] && parent[i] < p.row_indptr[g + 1]),
                      "[ValueError] parent: expected -1 or a row of group ", g, ", ", p.row_indptr[g], " to ",
                      p.row_indptr[g + 1] - 1, ", got ", parent[i]);
      STD_TORCH_CHECK(i == 0 || parent[i - 1] >= 0 || parent[i] < 0,
                      "[ValueError] parent: expected absent candidates (-1) last, got ", parent[i],
                      " after one in group ", g);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> beam_update_cpu(Tensor scores, Tensor parent, Tensor token, Tensor row_indptr,
                                                   Tensor beam_indptr, Tensor pool_scores, Tensor pool_lens,
                                                   Tensor pool_parents, Tensor pool_tokens, Tensor done,
                                                   Tensor gen_lens, Tensor max_new_tokens, Tensor eos_ids,
                                                   double length_penalty, int64_t early_stopping,
                                                   std::optional<Tensor> stop) {
  check_beam_update(scores, parent, token, row_indptr, beam_indptr, pool_scores, pool_lens, pool_parents, pool_tokens,
                    done, gen_lens, max_new_tokens, eos_ids, length_penalty, early_stopping, stop);
  const int64_t num_groups = scores.size(0), num_pool = pool_scores.size(0);
  Tensor running_scores = torch::stable::new_empty(pool_scores, {num_pool});
  Tensor running_parent = torch::stable::new_empty(pool_lens, {num_pool});
  Tensor running_token = torch::stable::new_empty(pool_lens, {num_pool});
  const cpu::BeamUpdateParams p{
      scores.const_data_ptr<float>(),
      parent.const_data_ptr<int32_t>(),
      token.const_data_ptr<int32_t>(),
      row_indptr.const_data_ptr<int32_t>(),
      beam_indptr.const_data_ptr<int32_t>(),
      gen_lens.const_data_ptr<int32_t>(),
      max_new_tokens.const_data_ptr<int32_t>(),
      eos_ids.const_data_ptr<int32_t>(),
      stop.has_value() ? stop->const_data_ptr<bool>() : nullptr,
      pool_scores.mutable_data_ptr<float>(),
      pool_lens.mutable_data_ptr<int32_t>(),
      pool_parents.mutable_data_ptr<int32_t>(),
      pool_tokens.mutable_data_ptr<int32_t>(),
      done.mutable_data_ptr<bool>(),
      running_scores.mutable_data_ptr<float>(),
      running_parent.mutable_data_ptr<int32_t>(),
      running_token.mutable_data_ptr<int32_t>(),
      scores.size(1),
      eos_ids.size(0),
      length_penalty,
      static_cast<int32_t>(early_stopping),
  };
  check_groups(p, num_groups, num_pool);
  // A group is about a microsecond of work: only very many of them are worth a second thread.
  parallel_for(0, num_groups, 128, [&](int64_t begin, int64_t end) { cpu::beam_update(p, begin, end); });
  return {running_scores, running_parent, running_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("beam_update", TORCH_BOX(&beam_update_cpu)); }

}  // namespace treedecode
