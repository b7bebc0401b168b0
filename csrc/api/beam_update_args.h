#pragma once

#include <optional>

#include "../check.h"

namespace treedecode {

inline void check_vector(const Tensor& t, const char* name, const char* text, int64_t size, ScalarType dtype) {
  check_shape(t, name, text, {size});
  check_dtype(t, name, dtype);
  check_contiguous(t, name);
}

inline void check_candidates(const Tensor& t, const char* name, const Tensor& scores, ScalarType dtype) {
  check_shape(t, name, "the shape of scores", {scores.size(0), scores.size(1)});
  check_dtype(t, name, dtype);
  check_contiguous(t, name);
}

// Checks all arguments, except for values in tensors.
inline void check_beam_update(const Tensor& scores, const Tensor& parent, const Tensor& token, const Tensor& row_indptr,
                              const Tensor& beam_indptr, const Tensor& pool_scores, const Tensor& pool_lens,
                              const Tensor& pool_parents, const Tensor& pool_tokens, const Tensor& done,
                              const Tensor& gen_lens, const Tensor& max_new_tokens, const Tensor& eos_ids,
                              double length_penalty, int64_t early_stopping, const std::optional<Tensor>& stop) {
  check_shape(scores, "scores", "[num_groups, num_candidates]", {-1, -1});
  check_dtype(scores, "scores", ScalarType::Float);
  check_contiguous(scores, "scores");
  check_candidates(parent, "parent", scores, ScalarType::Int);
  check_candidates(token, "token", scores, ScalarType::Int);
  if (stop.has_value()) check_candidates(*stop, "stop", scores, ScalarType::Bool);
  const int64_t num_groups = scores.size(0);
  check_vector(row_indptr, "row_indptr", "[num_groups + 1]", num_groups + 1, ScalarType::Int);
  check_vector(beam_indptr, "beam_indptr", "[num_groups + 1]", num_groups + 1, ScalarType::Int);
  check_vector(pool_scores, "pool_scores", "[num_beams]", -1, ScalarType::Float);
  const int64_t num_pool = pool_scores.size(0);
  check_vector(pool_lens, "pool_lens", "the shape of pool_scores", num_pool, ScalarType::Int);
  check_vector(pool_parents, "pool_parents", "the shape of pool_scores", num_pool, ScalarType::Int);
  check_vector(pool_tokens, "pool_tokens", "the shape of pool_scores", num_pool, ScalarType::Int);
  check_vector(done, "done", "[num_groups]", num_groups, ScalarType::Bool);
  check_vector(gen_lens, "gen_lens", "[num_groups]", num_groups, ScalarType::Int);
  check_vector(max_new_tokens, "max_new_tokens", "[num_groups]", num_groups, ScalarType::Int);
  check_vector(eos_ids, "eos_ids", "[num_eos]", -1, ScalarType::Int);
  check_value(early_stopping >= 0 && early_stopping <= 2, "early_stopping", "0, 1 or 2",
              static_cast<double>(early_stopping));
  check_value(length_penalty - length_penalty == 0.0, "length_penalty", "a finite number", length_penalty);
}

}  // namespace treedecode
