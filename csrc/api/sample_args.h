#pragma once

#include "logits.h"

namespace treedecode {

// Checks a setting: one value per row, or a single value for all rows.
template <typename T>
struct PerRow {
  const T* data;
  int64_t stride;
  T operator[](int64_t row) const { return data[row * stride]; }
};

template <typename T>
inline PerRow<T> per_row(const Tensor& t, const char* name, ScalarType dtype, int64_t rows) {
  STD_TORCH_CHECK(t.dim() == 1 && (t.size(0) == rows || t.size(0) == 1), "[ValueError] ", name,
                  ": expected shape [rows] = [", rows, "] or [1], got ", shape_of(t));
  check_dtype(t, name, dtype);
  return {t.const_data_ptr<T>(), t.size(0) == 1 ? 0 : t.stride(0)};
}

}  // namespace treedecode
