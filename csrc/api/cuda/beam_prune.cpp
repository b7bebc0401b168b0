#include "../../cuda/logits/beam_prune.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "../beam_prune_args.h"
#include "device.h"
#include "logits_params.h"

namespace treedecode {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_prune_cuda(Tensor logits, Tensor cum_logprobs, Tensor group_indptr,
                                                           int64_t num_candidates, std::optional<Tensor> token_mask,
                                                           bool is_logprobs) {
  check_beam_prune(logits, cum_logprobs, group_indptr, num_candidates, token_mask);
  check_device({{&logits, "logits"},
                {&cum_logprobs, "cum_logprobs"},
                {&group_indptr, "group_indptr"},
                {token_mask ? &*token_mask : nullptr, "token_mask"}});
  const int64_t rows = logits.size(0), k = num_candidates, row_k = std::min(k, logits.size(1));
  const int64_t num_groups = group_indptr.size(0) - 1;
  const cuda::LogitsParams l = logits_params(logits, token_mask);
  const int64_t chunks = rows * l.num_chunks, slot_len = cuda::beam_prune_slot_len(row_k, l.chunk_len);
  const int64_t row_sort_len = cuda::beam_prune_sort_len(row_k);
  const int64_t group_sort_len = cuda::beam_prune_sort_len(std::min(k, rows * row_k));

  const DeviceGuard guard(logits.get_device_index());
  Tensor scores = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Float);
  Tensor parent = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Int);
  Tensor token = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Int);
  Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  cuda::BeamPruneParams p{};
  p.logits = l;
  p.cum_logprobs = cum_logprobs.const_data_ptr<float>();
  p.group_indptr = group_indptr.const_data_ptr<int32_t>();
  p.scores = scores.mutable_data_ptr<float>();
  p.parent = parent.mutable_data_ptr<int32_t>();
  p.token = token.mutable_data_ptr<int32_t>();
  p.lse = lse.mutable_data_ptr<float>();
  p.num_groups = num_groups;
  p.k = k;
  p.row_k = row_k;
  p.slot_len = slot_len;
  p.row_sort_len = row_sort_len;
  p.group_sort_len = group_sort_len;
  p.is_logprobs = is_logprobs;
  Scratch scratch;
  scratch.add(&p.chunk_sums, chunks);
  scratch.add(&p.chunk_keys, chunks * slot_len);
  scratch.add(&p.row_keys, rows * row_k);
  scratch.add(&p.row_tokens, rows * row_k);
  scratch.add(&p.row_sort, rows * row_sort_len);
  scratch.add(&p.group_sort, num_groups * group_sort_len);
  scratch.add(&p.tickets, num_groups);
  const Tensor memory = scratch.allocate(logits);
  check_launch(cuda::beam_prune(p, current_stream(logits)), "beam_prune");
  return {scores, parent, token, lse};
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("beam_prune", TORCH_BOX(&beam_prune_cuda)); }

}  // namespace treedecode
