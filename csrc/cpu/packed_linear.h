// packed_linear: x W^T with weights laid out for few rows of x, then a bias, a gate and a residual.
//
// Weights come in panels of 16 output features, so that a panel is read from memory once, in order, for any number of
// rows. An output element is summed over k in the same order for any number of rows, so a row's result does not depend
// on the other rows.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

namespace treedecode::cpu {

inline constexpr int64_t kPanel = 16;     // output features of a panel
inline constexpr int64_t kRowBlock = 16;  // rows of x packed together

enum class Gate : int32_t { None = 0, Silu = 1, GeluTanh = 2 };

struct PackedLinearParams {
  const void* x;         // [num_rows, in_features], row stride x_stride
  const void* weight;    // [num_panels, in_features, 16]; bf16: [num_panels, in_features / 2, 16, 2]
  const void* bias;      // [num_panels * 16] or null
  const void* residual;  // [num_rows, out_features] or null, row stride residual_stride
  void* out;             // [num_rows, out_features]
  void* packed_x;        // [ceil(num_rows / 16), in_features, 16] fp32, or half of that as bf16: pairs, or rows for AMX
  int64_t num_rows;
  int64_t in_features;
  int64_t out_features;
  int64_t x_stride;         // in elements
  int64_t residual_stride;  // in elements
  Gate gate;                // not None: panels alternate gate, up, and num_panels is even
  DType dtype;              // of x, weight, bias, residual and out
};

}  // namespace treedecode::cpu

// Packs row blocks [begin, end) of x.
TD_DECLARE_KERNEL(pack_rows, void pack_rows(const PackedLinearParams& p, int64_t begin, int64_t end))
// Computes output panels [begin, end): features 16 * begin to 16 * end of every row.
TD_DECLARE_KERNEL(packed_linear, void packed_linear(const PackedLinearParams& p, int64_t begin, int64_t end))
