#pragma once

#include <optional>

#include "logits.h"

namespace treedecode {

// Checks all arguments, except for the values in cum_logprobs and group_indptr.
inline void check_beam_prune(const Tensor& logits, const Tensor& cum_logprobs, const Tensor& group_indptr,
                             int64_t num_candidates, const std::optional<Tensor>& token_mask) {
  check_logits(logits);
  check_shape(cum_logprobs, "cum_logprobs", "[rows]", {logits.size(0)});
  check_dtype(cum_logprobs, "cum_logprobs", ScalarType::Float);
  check_contiguous(cum_logprobs, "cum_logprobs");
  check_shape(group_indptr, "group_indptr", "[num_groups + 1]", {-1});
  check_dtype(group_indptr, "group_indptr", ScalarType::Int);
  check_contiguous(group_indptr, "group_indptr");
  check_value(num_candidates >= 1 && num_candidates <= 65536, "num_candidates", "1 to 65536",
              static_cast<double>(num_candidates));
  STD_TORCH_CHECK(group_indptr.size(0) > 0,
                  "[ValueError] group_indptr: expected offsets from 0 to rows = ", logits.size(0));
  if (token_mask) check_token_mask(*token_mask, logits);
}

}  // namespace treedecode
