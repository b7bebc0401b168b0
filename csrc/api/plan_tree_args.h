#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "../check.h"
#include "../cpu/plan_tree.h"

namespace treedecode {

using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as in the op's schema

inline void check_lens(const Tensor& lens, const char* name, int64_t num_rows) {
  check_shape(lens, name, "[num_branches]", {num_rows});
  check_dtype(lens, name, ScalarType::Int);
  check_contiguous(lens, name);
}

// Checks all arguments, except for the values in seq_lens and q_lens.
inline void check_plan_tree(const Tensor& page_table, const Tensor& seq_lens, const std::optional<Tensor>& q_lens,
                            int64_t page_size, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim,
                            int64_t num_workers) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check_shape(page_table, "page_table", "[num_branches, max_pages]", {-1, -1});
  check_dtype(page_table, "page_table", ScalarType::Int);
  check_unit_stride(page_table, "page_table");
  const int64_t num_rows = page_table.size(0);
  check_lens(seq_lens, "seq_lens", num_rows);
  if (q_lens) check_lens(*q_lens, "q_lens", num_rows);
  check_value(page_size > 0 && page_size <= kMax, "page_size", "a positive number", page_size);
  check_value(num_kv_heads > 0, "num_kv_heads", "a positive number", num_kv_heads);
  check_value(num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0, "num_qo_heads", "a multiple of num_kv_heads",
              num_qo_heads);
  check_value(cpu::is_head_dim(head_dim), "head_dim", "a multiple of 8 up to 256", head_dim);
  check_value(num_workers >= 0 && num_workers <= kMax, "num_workers", "0 (a chained plan) or more", num_workers);
}

}  // namespace treedecode
