// 2^t for the sums over a vocabulary: cheaper than vec.h's exp, and accurate enough for them.
#pragma once

#include <limits>

#include "vec.h"

namespace treedecode::cpu::TD_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// How many registers the long loops carry side by side: an exponential is one dependent chain of about 50 cycles, and
// interleaving chains in the source leaves less to the core's scheduler.
#if defined(TD_ISA_AVX512)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

// t becomes 2^t. 2^t = 2^floor(t) * p(t - floor(t)), p of degree 5, minimax on [0, 1): relative error below 2e-7 in
// fp32 arithmetic. -inf gives 0, +inf and anything from 128 on +inf, NaN itself.
template <int Num>
static inline __attribute__((always_inline)) void exp2_inplace(Vec (&t)[Num]) {
  constexpr float kCoefficients[] = {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
  Vec f[Num], p[Num];
#if defined(TD_ISA_AVX512)
  for (int j = 0; j < Num; ++j) f[j] = {_mm512_reduce_ps(t[j].v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#else
  Vec whole[Num];
  for (int j = 0; j < Num; ++j) {
    const Vec clamped = select(is_nan(t[j]), Vec::zero(), min(Vec::set(250.0f), max(Vec::set(-126.0f), t[j])));
    const Vec nearest = round_nearest(clamped);
    whole[j] = nearest - select(nearest > clamped, Vec::set(1.0f), Vec::zero());
    f[j] = clamped - whole[j];
  }
#endif
  for (int j = 0; j < Num; ++j) p[j] = Vec::set(1.8775767e-3f);
  for (const float coefficient : kCoefficients) {
    for (int j = 0; j < Num; ++j) p[j] = fma(p[j], f[j], Vec::set(coefficient));
  }
#if defined(TD_ISA_AVX512)
  for (int j = 0; j < Num; ++j) t[j] = {_mm512_scalef_ps(p[j].v, t[j].v)};  // scales by floor(t)
#else
  for (int j = 0; j < Num; ++j) {
    const Vec y = select(t[j] < Vec::set(-126.0f), Vec::zero(), scale_by_pow2(p[j], whole[j]));
    t[j] = select(is_nan(t[j]), t[j], y);
  }
#endif
}

static inline Vec exp2(Vec t) {
  Vec one[1] = {t};
  exp2_inplace(one);
  return one[0];
}

// Lanes that a packed token mask allows among the Vec::N tokens from i on; i is a multiple of Vec::N.
static inline Mask allowed_lanes(const int32_t* mask /* [ceil(vocab / 32)] */, int64_t i) {
  return mask_from_bits(static_cast<uint32_t>(mask[i >> 5]) >> (i & 31));
}

}  // namespace treedecode::cpu::TD_ISA
