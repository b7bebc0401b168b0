// 2^t for the sums over a vocabulary: cheaper than vec.h's exp, and accurate enough for them.
#pragma once

#include <limits>

#include "vec.h"

namespace treedecode::cpu::TD_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// 2^t = 2^floor(t) * p(t - floor(t)), p of degree 5, near minimax on [0, 1): relative error below 2e-7 in fp32
// arithmetic. -inf gives 0, +inf and anything from 128 on +inf, NaN itself.
static inline Vec exp2(Vec t) {
#if defined(TD_ISA_AVX512)
  const Vec f{_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#else
  const Mask nan = is_nan(t);
  const Vec clamped = select(nan, Vec::zero(), min(Vec::set(250.0f), max(Vec::set(-126.0f), t)));
  const Vec nearest = round_nearest(clamped);
  const Vec whole = nearest - select(nearest > clamped, Vec::set(1.0f), Vec::zero());
  const Vec f = clamped - whole;
#endif
  Vec p = Vec::set(1.8775767e-3f);
  p = fma(p, f, Vec::set(8.9893397e-3f));
  p = fma(p, f, Vec::set(5.5826318e-2f));
  p = fma(p, f, Vec::set(2.4015361e-1f));
  p = fma(p, f, Vec::set(6.9315308e-1f));
  p = fma(p, f, Vec::set(9.9999994e-1f));
#if defined(TD_ISA_AVX512)
  return {_mm512_scalef_ps(p.v, t.v)};  // scales by floor(t)
#else
  const Vec y = scale_by_pow2(p, whole);
  return select(nan, t, select(t < Vec::set(-126.0f), Vec::zero(), y));
#endif
}

// Lanes that a packed token mask allows among the Vec::N tokens from i on; i is a multiple of Vec::N.
static inline Mask allowed_lanes(const int32_t* mask /* [ceil(vocab / 32)] */, int64_t i) {
  return mask_from_bits(static_cast<uint32_t>(mask[i >> 5]) >> (i & 31));
}

}  // namespace treedecode::cpu::TD_ISA
