#include "../cpu/merge_states.h"

#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "parallel.h"

namespace treedecode {
namespace {

cpu::MergeStatesParams params_of(const Tensor& part_out, const Tensor& part_lse, const Tensor& merge_indptr,
                                 const Tensor& out, const Tensor& lse) {
  const ScalarType dtype = part_out.scalar_type();
  return {
      part_out.const_data_ptr(),
      part_lse.const_data_ptr<float>(),
      merge_indptr.const_data_ptr<int32_t>(),
      out.mutable_data_ptr(),
      lse.mutable_data_ptr<float>(),
      part_out.size(1),
      part_out.size(2),
      {part_out.stride(0), part_out.stride(1)},
      dtype == ScalarType::Float      ? DType::F32
      : dtype == ScalarType::BFloat16 ? DType::BF16
                                      : DType::F16,
  };
}

std::tuple<Tensor, Tensor> merge_states_cpu(Tensor part_out, Tensor part_lse, Tensor merge_indptr) {
  check_shape(part_out, "part_out", "[num_parts, num_heads, head_dim]", {-1, -1, -1});
  check_float_dtype(part_out, "part_out");
  check_unit_stride(part_out, "part_out");
  check_shape(part_lse, "part_lse", "[num_parts, num_heads]", {part_out.size(0), part_out.size(1)});
  check_dtype(part_lse, "part_lse", ScalarType::Float);
  check_contiguous(part_lse, "part_lse");
  check_shape(merge_indptr, "merge_indptr", "[num_states + 1]", {-1});
  check_dtype(merge_indptr, "merge_indptr", ScalarType::Int);
  check_contiguous(merge_indptr, "merge_indptr");
  const int64_t num_states = merge_indptr.size(0) - 1;
  check_value(num_states >= 0, "merge_indptr", "at least one offset", merge_indptr.size(0));
  const int32_t* indptr = merge_indptr.const_data_ptr<int32_t>();
  for (int64_t i = 0; i <= num_states; ++i) {
    const int64_t least = i ? indptr[i - 1] : 0;
    STD_TORCH_CHECK(indptr[i] >= least && indptr[i] <= part_out.size(0),
                    "[ValueError] merge_indptr: expected offsets that do not decrease, up to num_parts = ",
                    part_out.size(0), ", got ", indptr[i], " at index ", i);
  }

  Tensor out = torch::stable::new_empty(part_out, {num_states, part_out.size(1), part_out.size(2)});
  Tensor lse = torch::stable::new_empty(part_lse, {num_states, part_out.size(1)});
  const cpu::MergeStatesParams p = params_of(part_out, part_lse, merge_indptr, out, lse);
  // A thread is worth waking for about 64k numbers.
  const int64_t numbers = p.num_heads * p.head_dim * (part_out.size(0) + num_states) / std::max<int64_t>(1, num_states);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, numbers));
  parallel_for(0, num_states, grain, [&](int64_t begin, int64_t end) { TD_DISPATCH(merge_states)(p, begin, end); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("merge_states", TORCH_BOX(&merge_states_cpu)); }

}  // namespace treedecode
