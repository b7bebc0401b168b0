#pragma once

#include <limits>
#include <optional>

#include "../check.h"
#include "../cpu/plan_tree.h"

namespace treedecode {

inline void check_cache(const Tensor& pages, const char* name, const Tensor& q) {
  check_shape(pages, name, "[num_pages, page_size, num_kv_heads, head_dim]", {-1, -1, -1, q.size(2)});
  check_dtype(pages, name, q.scalar_type());
  check_unit_stride(pages, name);
}

inline void check_index(const Tensor& t, const char* name, const char* text, std::initializer_list<int64_t> shape) {
  check_shape(t, name, text, shape);
  check_dtype(t, name, ScalarType::Int);
  check_contiguous(t, name);
}

// Returns the checked chunks or counts of a plan as the structs of their rows.
template <typename Row>
const Row* rows_of(const Tensor& t) {
  return reinterpret_cast<const Row*>(t.const_data_ptr<int32_t>());
}

inline bool is_positive_float(double x) {
  return x >= std::numeric_limits<float>::min() && x <= std::numeric_limits<float>::max();
}

inline void check_plan_tensors(const Tensor& page_table, const Tensor& seq_lens, const Tensor& q_indptr,
                               const Tensor& part_indptr, const Tensor& chunks, const Tensor& counts,
                               const Tensor& order, const Tensor& row_indptr) {
  check_shape(page_table, "page_table", "[num_branches, max_pages]", {-1, -1});
  check_dtype(page_table, "page_table", ScalarType::Int);
  check_unit_stride(page_table, "page_table");
  const int64_t num_rows = page_table.size(0);
  check_index(seq_lens, "seq_lens", "[num_branches]", {num_rows});
  check_index(q_indptr, "plan.q_indptr", "[num_branches + 1]", {num_rows + 1});
  check_index(part_indptr, "plan.part_indptr", "[num_branches + 1]", {num_rows + 1});
  check_index(chunks, "plan.chunks", "[max_chunks, 6]", {-1, cpu::kChunkColumns});
  check_index(counts, "plan.counts", "[6]", {cpu::kNumCounts});
  check_index(order, "plan.order", "[num_branches]", {num_rows});
  check_index(row_indptr, "plan.row_indptr", "[num_branches + 1]", {num_rows + 1});
}

struct AttentionNames {
  const char* sm_scale = "sm_scale";
  const char* window_left = "window_left";
  const char* soft_cap = "logits_soft_cap";
};

inline void check_attention_numbers(double sm_scale, int64_t window_left, double soft_cap,
                                    const AttentionNames& names = {}) {
  check_value(is_positive_float(sm_scale), names.sm_scale, "a positive number of the range of fp32", sm_scale);
  check_value(soft_cap == 0 || is_positive_float(soft_cap), names.soft_cap,
              "0 (off) or a positive number of the range of fp32", soft_cap);
  check_value(window_left >= -1, names.window_left, "-1 (no limit) or more", window_left);
}

// Checks all arguments, except for values in tensors.
inline void check_tree_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                 const Tensor& page_table, const Tensor& seq_lens, const Tensor& q_indptr,
                                 const Tensor& part_indptr, const Tensor& chunks, const Tensor& counts,
                                 const Tensor& order, const Tensor& row_indptr, const Tensor& out,
                                 const std::optional<Tensor>& lse, double sm_scale, int64_t window_left,
                                 double logits_soft_cap, const std::optional<Tensor>& sinks) {
  check_shape(q, "q", "[num_q, num_qo_heads, head_dim]", {-1, -1, -1});
  check_float_dtype(q, "q");
  check_unit_stride(q, "q");
  const int64_t num_qo_heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(cpu::is_head_dim(head_dim), "[ValueError] q: expected head_dim a multiple of 8 up to 256, got ",
                  head_dim);
  check_cache(k_pages, "k_pages", q);
  check_cache(v_pages, "v_pages", q);
  check_shape(v_pages, "v_pages", "the shape of k_pages",
              {k_pages.size(0), k_pages.size(1), k_pages.size(2), k_pages.size(3)});
  const int64_t num_kv_heads = k_pages.size(2);
  STD_TORCH_CHECK(num_kv_heads > 0 && num_qo_heads > 0 && num_qo_heads % num_kv_heads == 0,
                  "[ValueError] q: expected num_qo_heads a positive multiple of num_kv_heads = ", num_kv_heads,
                  ", got ", num_qo_heads);
  STD_TORCH_CHECK(k_pages.size(1) > 0, "[ValueError] k_pages: expected page_size above 0, got 0");
  check_plan_tensors(page_table, seq_lens, q_indptr, part_indptr, chunks, counts, order, row_indptr);
  check_shape(out, "out", "the shape of q", {q.size(0), num_qo_heads, head_dim});
  check_dtype(out, "out", q.scalar_type());
  check_contiguous(out, "out");
  if (lse) {
    check_shape(*lse, "lse", "[num_q, num_qo_heads]", {q.size(0), num_qo_heads});
    check_dtype(*lse, "lse", ScalarType::Float);
    check_contiguous(*lse, "lse");
  }
  check_attention_numbers(sm_scale, window_left, logits_soft_cap);
  if (sinks) {
    check_shape(*sinks, "sinks", "[num_qo_heads]", {num_qo_heads});
    check_dtype(*sinks, "sinks", ScalarType::Float);
    check_contiguous(*sinks, "sinks");
  }
}

}  // namespace treedecode
