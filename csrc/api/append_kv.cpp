#include "../cpu/append_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"

namespace treedecode {
namespace {

void check_pages(const Tensor& pages, const char* name, const Tensor& k) {
  check_shape(pages, name, "[num_pages, page_size, num_kv_heads, head_dim]", {-1, -1, k.size(1), k.size(2)});
  check_dtype(pages, name, k.scalar_type());
  check_unit_stride(pages, name);
}

void append_kv_cpu(Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor slots) {
  check_shape(k, "k", "[num_tokens, num_kv_heads, head_dim]", {-1, -1, -1});
  check_float_dtype(k, "k");
  check_unit_stride(k, "k");
  check_shape(v, "v", "the shape of k", {k.size(0), k.size(1), k.size(2)});
  check_dtype(v, "v", k.scalar_type());
  check_unit_stride(v, "v");
  check_pages(k_pages, "k_pages", k);
  check_pages(v_pages, "v_pages", k);
  check_shape(v_pages, "v_pages", "the shape of k_pages",
              {k_pages.size(0), k_pages.size(1), k_pages.size(2), k_pages.size(3)});
  check_shape(slots, "slots", "[num_tokens]", {k.size(0)});
  check_dtype(slots, "slots", ScalarType::Long);
  check_contiguous(slots, "slots");

  const int64_t num_slots = k_pages.size(0) * k_pages.size(1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < k.size(0); ++t) {
    STD_TORCH_CHECK(slot[t] < num_slots,
                    "[ValueError] slots: expected values below num_pages * page_size = ", num_slots, ", got ", slot[t],
                    " at index ", t);
  }

  const cpu::AppendKvParams p{
      k.const_data_ptr(),
      v.const_data_ptr(),
      k_pages.mutable_data_ptr(),
      v_pages.mutable_data_ptr(),
      slot,
      k.size(0),
      k.size(1),
      k.size(2),
      k_pages.size(1),
      static_cast<int64_t>(k.element_size()),
      {k.stride(0), k.stride(1)},
      {v.stride(0), v.stride(1)},
      {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)},
      {v_pages.stride(0), v_pages.stride(1), v_pages.stride(2)},
  };
  // Below 64 tokens the copies cost less than waking a thread.
  torch::stable::parallel_for(0, p.num_tokens, 64, [&](int64_t begin, int64_t end) { cpu::append_kv(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }

}  // namespace treedecode
