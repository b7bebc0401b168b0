// Selects the largest 64-bit keys: the scalar part of beam_prune and sample, the same for every instruction set.
#pragma once

#include <cfloat>
#include <cstdint>

#include "keys.h"

namespace treedecode::cpu {

// Returns a number below x, with only denormals in between. The one next to 0 is normal, because denormals may count as
// 0 (torch.set_flush_denormal).
static inline float just_below(float x) {
  const uint32_t u = ordered_bits(x) - 1, zero = 0x80000000u, least_normal = 0x00800000u;
  return u + least_normal >= zero && u < zero + least_normal ? -FLT_MIN : from_ordered_bits(u);
}

// Moves the k largest of n keys to the front, in any order, and returns the smallest of them; 0 < k <= n.
uint64_t keep_largest(uint64_t* keys /* [n] */, int64_t n, int64_t k);
void sort_descending(uint64_t* keys /* [n] */, int64_t n);

}  // namespace treedecode::cpu
