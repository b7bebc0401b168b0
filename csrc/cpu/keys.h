// 64-bit keys that rank (value, index) pairs, on the host and on the device.
#pragma once

#include <bit>
#include <cstdint>

namespace treedecode {

// Orders like the float itself; -0 and +0 are one value.
static constexpr uint32_t ordered_bits(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static constexpr float from_ordered_bits(uint32_t u) {
  return std::bit_cast<float>(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

// The larger key is the better one: value descending, then index ascending. All keys of distinct indices differ, so the
// best k do not depend on the order they come in.
static constexpr uint64_t make_key(float value, uint32_t index) {
  return (static_cast<uint64_t>(ordered_bits(value)) << 32) | (0xffffffffu - index);
}
static constexpr float key_value(uint64_t key) { return from_ordered_bits(static_cast<uint32_t>(key >> 32)); }
static constexpr uint32_t key_index(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace treedecode
