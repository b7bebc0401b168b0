#include "../cpu/packed_linear.h"

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "kernel_dtype.h"
#include "launch.h"
#include "parallel.h"

namespace treedecode {

cpu::Gate gate_of(const std::string& name) {
  if (name.empty()) return cpu::Gate::None;
  if (name == "silu") return cpu::Gate::Silu;
  STD_TORCH_CHECK(name == "gelu_tanh", "[ValueError] gate: expected '', 'silu' or 'gelu_tanh', got '", name, "'");
  return cpu::Gate::GeluTanh;
}

void launch(const cpu::PackedLinearParams& p) {
  // A thread is worth waking for a few microseconds of work: about 2^15 packed elements or 2^18 products.
  const int64_t blocks = (p.num_rows + cpu::kRowBlock - 1) / cpu::kRowBlock;
  const int64_t block_grain = 32768 / (cpu::kRowBlock * p.in_features) + 1;
  parallel_for(0, blocks, block_grain, [&](int64_t begin, int64_t end) { TD_DISPATCH(pack_rows)(p, begin, end); });
  const int64_t out_panels = (p.out_features + cpu::kPanel - 1) / cpu::kPanel;
  const int64_t panel_grain = 262144 / (p.num_rows * p.in_features * cpu::kPanel) + 1;
  parallel_for(0, out_panels, panel_grain,
               [&](int64_t begin, int64_t end) { TD_DISPATCH(packed_linear)(p, begin, end); });
}

namespace {

Tensor packed_linear_cpu(Tensor x, Tensor weight, int64_t out_features, std::optional<Tensor> bias,
                         std::optional<Tensor> residual, std::string gate_name) {
  check_shape(x, "x", "[num_rows, in_features]", {-1, -1});
  check_float_dtype(x, "x");
  check_unit_stride(x, "x");
  const int64_t rows = x.size(0), in_features = x.size(1);
  check_shape(weight, "weight", "[num_panels, in_features, 16]", {-1, in_features, cpu::kPanel});
  check_dtype(weight, "weight", x.scalar_type());
  check_contiguous(weight, "weight");
  check_value(in_features >= 2 && in_features % 2 == 0, "x", "an even number of in_features, at least 2",
              static_cast<double>(in_features));
  const cpu::Gate gate = gate_of(gate_name);
  const int64_t panels = weight.size(0);
  const int64_t out_panels = (out_features + cpu::kPanel - 1) / cpu::kPanel;
  check_value(out_features >= 1 && panels == (gate == cpu::Gate::None ? 1 : 2) * out_panels, "out_features",
              "a number that fills the panels of weight", static_cast<double>(out_features));
  if (bias) {
    check_shape(*bias, "bias", "[num_panels * 16]", {panels * cpu::kPanel});
    check_dtype(*bias, "bias", x.scalar_type());
    check_contiguous(*bias, "bias");
  }
  if (residual) {
    check_shape(*residual, "residual", "[num_rows, out_features]", {rows, out_features});
    check_dtype(*residual, "residual", x.scalar_type());
    check_unit_stride(*residual, "residual");
  }

  Tensor out = torch::stable::new_empty(x, {rows, out_features});
  if (rows == 0) return out;
  choose_threads(Threads::Torch);
  const int64_t blocks = (rows + cpu::kRowBlock - 1) / cpu::kRowBlock;
  Tensor packed_x = torch::stable::new_empty(x, {blocks, in_features, cpu::kRowBlock}, ScalarType::Float);
  const cpu::PackedLinearParams p{
      x.const_data_ptr(),
      weight.const_data_ptr(),
      bias ? bias->const_data_ptr() : nullptr,
      residual ? residual->const_data_ptr() : nullptr,
      out.mutable_data_ptr(),
      packed_x.mutable_data_ptr(),
      rows,
      in_features,
      out_features,
      x.stride(0),
      residual ? residual->stride(0) : 0,
      gate,
      kernel_dtype(x),
  };
  launch(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear_cpu)); }

}  // namespace treedecode
