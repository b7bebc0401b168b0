// What a kernel needs in between: several arrays in one allocation.
#pragma once

#include <array>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "../../check.h"

namespace treedecode {

// Arrays of `sizes` elements of `widths` bytes each on the device of `like`, not initialised. They go with the object;
// the allocator hands the memory to later work on the same stream only.
template <size_t N>
class Scratch {
 public:
  Scratch(const Tensor& like, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& widths) {
    int64_t bytes = 0;
    for (size_t i = 0; i < N; ++i) {
      offsets_[i] = bytes;
      bytes += (sizes[i] * widths[i] + 15) / 16 * 16;
    }
    memory_ = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  }

  template <typename T>
  T* get(size_t i) {
    return reinterpret_cast<T*>(memory_.mutable_data_ptr<uint8_t>() + offsets_[i]);
  }

 private:
  std::array<int64_t, N> offsets_;
  Tensor memory_;
};

}  // namespace treedecode
