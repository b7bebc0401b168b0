#include "../../cuda/logits/beam_update.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "../beam_update_args.h"
#include "device.h"

namespace treedecode {
namespace {

std::tuple<Tensor, Tensor, Tensor> beam_update_cuda(Tensor scores, Tensor parent, Tensor token, Tensor row_indptr,
                                                    Tensor beam_indptr, Tensor pool_scores, Tensor pool_lens,
                                                    Tensor pool_parents, Tensor pool_tokens, Tensor done,
                                                    Tensor gen_lens, Tensor max_new_tokens, Tensor eos_ids,
                                                    double length_penalty, int64_t early_stopping,
                                                    std::optional<Tensor> stop) {
  check_beam_update(scores, parent, token, row_indptr, beam_indptr, pool_scores, pool_lens, pool_parents, pool_tokens,
                    done, gen_lens, max_new_tokens, eos_ids, length_penalty, early_stopping, stop);
  check_device({{&scores, "scores"},
                {&parent, "parent"},
                {&token, "token"},
                {&row_indptr, "row_indptr"},
                {&beam_indptr, "beam_indptr"},
                {&pool_scores, "pool_scores"},
                {&pool_lens, "pool_lens"},
                {&pool_parents, "pool_parents"},
                {&pool_tokens, "pool_tokens"},
                {&done, "done"},
                {&gen_lens, "gen_lens"},
                {&max_new_tokens, "max_new_tokens"},
                {&eos_ids, "eos_ids"},
                {stop ? &*stop : nullptr, "stop"}});
  const int64_t num_groups = scores.size(0), num_candidates = scores.size(1), num_beams = pool_scores.size(0);

  const DeviceGuard guard(scores.get_device_index());
  Tensor running_scores = torch::stable::new_empty(pool_scores, {num_beams});
  Tensor running_parent = torch::stable::new_empty(pool_lens, {num_beams});
  Tensor running_token = torch::stable::new_empty(pool_lens, {num_beams});
  Tensor lists = torch::stable::new_empty(parent, {num_groups, 3, num_candidates});
  const cuda::BeamUpdateParams p{
      scores.const_data_ptr<float>(),
      parent.const_data_ptr<int32_t>(),
      token.const_data_ptr<int32_t>(),
      row_indptr.const_data_ptr<int32_t>(),
      beam_indptr.const_data_ptr<int32_t>(),
      gen_lens.const_data_ptr<int32_t>(),
      max_new_tokens.const_data_ptr<int32_t>(),
      eos_ids.const_data_ptr<int32_t>(),
      stop ? stop->const_data_ptr<bool>() : nullptr,
      pool_scores.mutable_data_ptr<float>(),
      pool_lens.mutable_data_ptr<int32_t>(),
      pool_parents.mutable_data_ptr<int32_t>(),
      pool_tokens.mutable_data_ptr<int32_t>(),
      done.mutable_data_ptr<bool>(),
      running_scores.mutable_data_ptr<float>(),
      running_parent.mutable_data_ptr<int32_t>(),
      running_token.mutable_data_ptr<int32_t>(),
      lists.mutable_data_ptr<int32_t>(),
      num_groups,
      num_candidates,
      num_beams,
      eos_ids.size(0),
      length_penalty,
      static_cast<int32_t>(early_stopping),
  };
  check_launch(cuda::beam_update(p, current_stream(scores)), "beam_update");
  return {running_scores, running_parent, running_token};
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("beam_update", TORCH_BOX(&beam_update_cuda)); }

}  // namespace treedecode
