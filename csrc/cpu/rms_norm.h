// rms_norm: x / rms(x) * weight over the last dimension.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "strides.h"

namespace treedecode::cpu {

struct RmsNormParams {
  const void* x;       // [num_rows, num_heads, size], strides in x_stride
  const void* weight;  // [size]
  void* out;           // [num_rows, num_heads, size], contiguous
  int64_t num_heads;
  int64_t size;
  TokenStride x_stride;  // of rows and heads, in elements
  float eps;
  bool unit_offset;  // scale by 1 + weight before rounding, instead of by weight after it
  DType dtype;       // of x, weight and out
};

}  // namespace treedecode::cpu

TD_DECLARE_KERNEL(rms_norm, void rms_norm(const RmsNormParams& p, int64_t row_begin, int64_t row_end))
