// 2^t for the sums over a vocabulary: cheaper than vec.h's exp, and accurate enough for them.
#pragma once

#include <limits>

#include "vec.h"

namespace treedecode::cpu::TD_ISA {

constexpr float kLog2E = 1.44269504088896341f;

// Registers that the long loops compute side by side: an exponential is one dependent chain of about 50 cycles, and
// chains interleaved in the source leave less to the core's scheduler.
constexpr int kWide = 4;

// Loads kWide registers of x, with the lanes in any order: two instructions load and widen two registers of bf16, while
// four are needed to keep the order.
template <typename T>
static inline __attribute__((always_inline)) void load_wide(const T* x /* [kWide * Vec::N] */, Vec (&v)[kWide]) {
  for (int j = 0; j < kWide; ++j) v[j] = Vec::load(x + j * Vec::N);
}
static inline __attribute__((always_inline)) void load_wide(const bf16* x, Vec (&v)[kWide]) {
  for (int j = 0; j < kWide; j += 2) Vec::load_pairs(x + j * Vec::N, v[j], v[j + 1]);
}

// 2^t, with a relative error below 2e-7 in fp32 arithmetic. -inf gives 0, 128 and more give +inf, NaN gives NaN.
#if defined(TD_ISA_AVX512)
// 2^(j / 32)
alignas(64) constexpr float kPowers[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};

// 2^t = 2^floor(t) * 2^(j/32) * p(r) with j / 32 + r the fraction of t: two registers hold the table, and p of degree 2
// (minimax on [0, 1/32)) is enough. The number of instructions bounds the loops over a vocabulary.
template <int Num>
static inline __attribute__((always_inline)) void exp2_parts(Vec (&t)[Num], Vec (&fraction)[Num], Vec (&p)[Num]) {
  // t + shift has floor(32 t) in its low bits.
  const __m512 shift = _mm512_set1_ps(0x1.8p18f);
  const __m512 low = _mm512_load_ps(kPowers), high = _mm512_load_ps(kPowers + 16);
  Vec r[Num];
  for (int j = 0; j < Num; ++j) r[j] = {_mm512_reduce_ps(t[j].v, 5 << 4 | _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  for (int j = 0; j < Num; ++j) {
    const __m512 sum = _mm512_add_round_ps(t[j].v, shift, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    fraction[j] = {_mm512_permutex2var_ps(low, _mm512_castps_si512(sum), high)};
  }
  for (int j = 0; j < Num; ++j) p[j] = fma(r[j], Vec::set(0.24265269f), Vec::set(0.69312373f));
  for (int j = 0; j < Num; ++j) p[j] = fma(p[j], r[j], Vec::set(1.0f));
}

// Replaces t by 2^t.
template <int Num>
static inline __attribute__((always_inline)) void exp2_inplace(Vec (&t)[Num]) {
  Vec fraction[Num], p[Num];
  exp2_parts(t, fraction, p);
  for (int j = 0; j < Num; ++j) t[j] = {_mm512_scalef_ps((fraction[j] * p[j]).v, t[j].v)};  // scales by floor(t)
}

// Adds 2^t to sums.
template <int Num>
static inline __attribute__((always_inline)) void add_exp2(Vec (&t)[Num], Vec (&sums)[Num]) {
  Vec fraction[Num], p[Num];
  exp2_parts(t, fraction, p);
  for (int j = 0; j < Num; ++j) sums[j] = fma({_mm512_scalef_ps(fraction[j].v, t[j].v)}, p[j], sums[j]);
}
#else
// 2^t = 2^floor(t) * p(t - floor(t)), p of degree 5, minimax on [0, 1).
template <int Num>
static inline __attribute__((always_inline)) void exp2_inplace(Vec (&t)[Num]) {
  constexpr float kCoefficients[] = {8.9893397e-3f, 5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
  Vec f[Num], p[Num], whole[Num];
  for (int j = 0; j < Num; ++j) {
    const Vec clamped = select(is_nan(t[j]), Vec::zero(), min(Vec::set(250.0f), max(Vec::set(-126.0f), t[j])));
    const Vec nearest = round_nearest(clamped);
    whole[j] = nearest - select(nearest > clamped, Vec::set(1.0f), Vec::zero());
    f[j] = clamped - whole[j];
  }
  for (int j = 0; j < Num; ++j) p[j] = Vec::set(1.8775767e-3f);
  for (const float coefficient : kCoefficients) {
    for (int j = 0; j < Num; ++j) p[j] = fma(p[j], f[j], Vec::set(coefficient));
  }
  for (int j = 0; j < Num; ++j) {
    const Vec y = select(t[j] < Vec::set(-126.0f), Vec::zero(), scale_by_pow2(p[j], whole[j]));
    t[j] = select(is_nan(t[j]), t[j], y);
  }
}

template <int Num>
static inline __attribute__((always_inline)) void add_exp2(Vec (&t)[Num], Vec (&sums)[Num]) {
  exp2_inplace(t);
  for (int j = 0; j < Num; ++j) sums[j] += t[j];
}
#endif

static inline Vec exp2(Vec t) {
  Vec one[1] = {t};
  exp2_inplace(one);
  return one[0];
}

// Returns the lanes that a packed token mask allows among the Vec::N tokens from i on; i is a multiple of Vec::N.
static inline Mask allowed_lanes(const int32_t* mask /* [ceil(vocab / 32)] */, int64_t i) {
  return mask_from_bits(static_cast<uint32_t>(mask[i >> 5]) >> (i & 31));
}

}  // namespace treedecode::cpu::TD_ISA
