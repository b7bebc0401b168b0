// Storage-only 16-bit types with exact scalar conversions. Kernels compute in fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace treedecode {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class DType : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

namespace dtypes_detail {
static inline uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
}  // namespace dtypes_detail

static inline float to_float(float x) { return x; }

static inline float to_float(bf16 x) { return dtypes_detail::as_float(static_cast<uint32_t>(x.bits) << 16); }

static inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return dtypes_detail::as_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return dtypes_detail::as_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

template <typename T>
static inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = dtypes_detail::as_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
inline fp16 from_float<fp16>(float x) {
  const uint32_t u = dtypes_detail::as_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to >= 65536: inf
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: subnormal
    // Adding 0.5 lines the result's ulp up with 2^-24, so the hardware's own rounding does the work.
    const float shifted = dtypes_detail::as_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (dtypes_detail::as_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace treedecode
