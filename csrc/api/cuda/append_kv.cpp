#include "../../cuda/pages/append_kv.h"

#include "../append_kv_args.h"
#include "device.h"

namespace treedecode {
namespace {

void append_kv_cuda(Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor slots) {
  check_append_kv(k, v, k_pages, v_pages, slots);
  check_device({{&k, "k"}, {&v, "v"}, {&k_pages, "k_pages"}, {&v_pages, "v_pages"}, {&slots, "slots"}});
  const auto size = static_cast<int64_t>(k.element_size());
  const cuda::AppendKvParams p{
      k.const_data_ptr(),
      v.const_data_ptr(),
      k_pages.mutable_data_ptr(),
      v_pages.mutable_data_ptr(),
      slots.const_data_ptr<int64_t>(),
      k.size(0),
      k_pages.size(0) * k_pages.size(1),
      k.size(1),
      k.size(2) * size,
      k_pages.size(1),
      {k.stride(0) * size, k.stride(1) * size},
      {v.stride(0) * size, v.stride(1) * size},
      {k_pages.stride(0) * size, k_pages.stride(1) * size, k_pages.stride(2) * size},
      {v_pages.stride(0) * size, v_pages.stride(1) * size, v_pages.stride(2) * size},
  };
  const DeviceGuard guard(k.get_device_index());
  check_launch(cuda::append_kv(p, current_stream(k)), "append_kv");
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("append_kv", TORCH_BOX(&append_kv_cuda)); }

}  // namespace treedecode
