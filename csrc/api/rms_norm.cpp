#include "../cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "kernel_dtype.h"
#include "launch.h"
#include "parallel.h"

namespace treedecode {

void launch(const cpu::RmsNormParams& p, int64_t num_rows) {
  const int64_t grain = 32768 / (p.num_heads * p.size + 1) + 1;
  parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) { TD_DISPATCH(rms_norm)(p, begin, end); });
}

namespace {

Tensor rms_norm_cpu(Tensor x, Tensor weight, double eps, bool unit_offset) {
  check_shape(x, "x", "[num_rows, num_heads, size]", {-1, -1, -1});
  check_float_dtype(x, "x");
  check_unit_stride(x, "x");
  check_shape(weight, "weight", "[size]", {x.size(2)});
  check_dtype(weight, "weight", x.scalar_type());
  check_contiguous(weight, "weight");
  check_value(eps >= 0, "eps", "a non-negative number", eps);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  const cpu::RmsNormParams p{
      x.const_data_ptr(), weight.const_data_ptr(),    out.mutable_data_ptr(),  x.size(1),
      x.size(2),          {x.stride(0), x.stride(1)}, static_cast<float>(eps), unit_offset,
      kernel_dtype(x),
  };
  launch(p, x.size(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu)); }

}  // namespace treedecode
