#include "../cpu/append_kv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "append_kv_args.h"
#include "launch.h"
#include "parallel.h"

namespace treedecode {

void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    STD_TORCH_CHECK(slots[t] < num_slots,
                    "[ValueError] slots: expected values below num_pages * page_size = ", num_slots, ", got ", slots[t],
                    " at index ", t);
  }
}

void launch(const cpu::AppendKvParams& p) {
  // Below 64 tokens the copies cost less than waking a thread.
  parallel_for(0, p.num_tokens, 64, [&](int64_t begin, int64_t end) { cpu::append_kv(p, begin, end); });
}

namespace {

void append_kv_cpu(Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor slots) {
  check_append_kv(k, v, k_pages, v_pages, slots);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  check_slots(slot, k.size(0), k_pages.size(0) * k_pages.size(1));

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
  launch(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }

}  // namespace treedecode
