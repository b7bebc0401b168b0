#pragma once

#include "../check.h"
#include "../cpu/dtypes.h"

namespace treedecode {

// Returns the DType of a tensor that check_float_dtype has accepted.
inline DType kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default: return DType::F32;
  }
}

}  // namespace treedecode
