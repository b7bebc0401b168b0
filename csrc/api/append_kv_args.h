#pragma once

#include "../check.h"

namespace treedecode {

inline void check_kv_pages(const Tensor& pages, const char* name, const Tensor& k) {
  check_shape(pages, name, "[num_pages, page_size, num_kv_heads, head_dim]", {-1, -1, k.size(1), k.size(2)});
  check_dtype(pages, name, k.scalar_type());
  check_unit_stride(pages, name);
}

// Checks all arguments, except for the values in slots.
inline void check_append_kv(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
                            const Tensor& slots) {
  check_shape(k, "k", "[num_tokens, num_kv_heads, head_dim]", {-1, -1, -1});
  check_float_dtype(k, "k");
  check_unit_stride(k, "k");
  check_shape(v, "v", "the shape of k", {k.size(0), k.size(1), k.size(2)});
  check_dtype(v, "v", k.scalar_type());
  check_unit_stride(v, "v");
  check_kv_pages(k_pages, "k_pages", k);
  check_kv_pages(v_pages, "v_pages", k);
  check_shape(v_pages, "v_pages", "the shape of k_pages",
              {k_pages.size(0), k_pages.size(1), k_pages.size(2), k_pages.size(3)});
  check_shape(slots, "slots", "[num_tokens]", {k.size(0)});
  check_dtype(slots, "slots", ScalarType::Long);
  check_contiguous(slots, "slots");
}

}  // namespace treedecode
