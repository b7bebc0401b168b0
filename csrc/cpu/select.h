// Selecting the largest 64-bit keys: the scalar part of beam_prune and sample, the same for every instruction set.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace treedecode::cpu {

// Orders like the float itself; -0 and +0 are one value.
static inline uint32_t ordered_bits(float x) {
  x += 0.0f;
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static inline float from_ordered_bits(uint32_t u) {
  u = u & 0x80000000u ? u & 0x7fffffffu : ~u;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// A number below x, with nothing but denormals in between. The one below 0 would be a denormal, which is equal to 0
// where they count as 0 (torch.set_flush_denormal).
static inline float just_below(float x) {
  const uint32_t u = ordered_bits(x) - 1, zero = 0x80000000u, least_normal = 0x00800000u;
  return u + least_normal >= zero && u < zero + least_normal ? -FLT_MIN : from_ordered_bits(u);
}

// The larger key is the better one: value descending, then index ascending. All keys of distinct indices differ, so
// the best k are the same whatever order they come in.
static inline uint64_t make_key(float value, uint32_t index) {
  return (static_cast<uint64_t>(ordered_bits(value)) << 32) | (0xffffffffu - index);
}
static inline float key_value(uint64_t key) { return from_ordered_bits(static_cast<uint32_t>(key >> 32)); }
static inline uint32_t key_index(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Moves the k largest of n keys to the front, in any order, and returns the smallest of them; 0 < k <= n.
uint64_t keep_largest(uint64_t* keys /* [n] */, int64_t n, int64_t k);
void sort_descending(uint64_t* keys /* [n] */, int64_t n);

}  // namespace treedecode::cpu
