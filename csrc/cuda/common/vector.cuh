// Types for copies in the widest accesses that addresses and strides allow.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace treedecode::cuda {

// The type of a copy of kBytes.
template <int kBytes>
using Word =
    std::conditional_t<kBytes == 16, ptx::Bytes16,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>;

// Calls f with std::integral_constant<int, n>, n the largest of 16, 4, 2, 1 that divides all of `bits` (addresses and
// strides in bytes, or-ed together).
template <typename F>
auto with_word_size(uint64_t bits, F&& f) {
  if (bits % 16 == 0) return f(std::integral_constant<int, 16>{});
  if (bits % 4 == 0) return f(std::integral_constant<int, 4>{});
  if (bits % 2 == 0) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 1>{});
}

}  // namespace treedecode::cuda
