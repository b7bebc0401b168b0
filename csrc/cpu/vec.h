// Vec: one register of fp32 lanes, for the ISA this translation unit is compiled for.
//
// A kernel is written once against this vocabulary. `Vec::N` is the number of lanes (4, 8 or 16). Loads convert from
// fp32, bf16 or fp16; stores round to nearest even. `load_n`/`store_n` touch only the first n elements of memory.
#pragma once

#include <cstdint>
#include <limits>

#include "dtypes.h"

#if defined(TD_ISA_AVX512) || defined(TD_ISA_AVX2)
#include <immintrin.h>
#endif

namespace treedecode::cpu::TD_ISA {

#if defined(TD_ISA_AVX512)

struct Mask {
  __mmask16 m;
  bool any() const { return m != 0; }
  uint32_t bits() const { return m; }
};

struct Vec {
  static constexpr int N = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec iota() { return {_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)}; }
  static __mmask16 head(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load_n(const float* p, int n, float fill = 0.0f) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), head(n), p)};
  }
  static Vec load_n(const bf16* p, int n, float fill = 0.0f) {
    return {_mm512_mask_blend_ps(head(n), _mm512_set1_ps(fill), widen(_mm256_maskz_loadu_epi16(head(n), p)).v)};
  }
  static Vec load_n(const fp16* p, int n, float fill = 0.0f) {
    return {_mm512_mask_blend_ps(head(n), _mm512_set1_ps(fill), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(head(n), p)))};
  }

  // Loads 2 N values: those at even positions to `even`, the others to `odd`.
  static void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    const __m512i pairs = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(fp16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, head(n), v); }
  void store_n(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, head(n), narrow()); }
  void store_n(fp16* p, int n) const { _mm256_mask_storeu_epi16(p, head(n), half()); }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }

  // bf16 lanes, round to nearest even, NaN kept.
  __m256i narrow() const {
#if defined(TD_ISA_AVX512_BF16)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet));
#endif
  }

 private:
  static Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
static inline Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
static inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
static inline Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
static inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
static inline Mask operator!(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
static inline Mask mask_from_bits(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
static inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }

static inline Vec scale_by_pow2(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
static inline Vec round_nearest(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

#elif defined(TD_ISA_AVX2)

struct Mask {
  __m256 m;
  bool any() const { return _mm256_movemask_ps(m) != 0; }
  uint32_t bits() const { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
};

struct Vec {
  static constexpr int N = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec iota() { return {_mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  template <typename T>
  static Vec load_n(const T* p, int n, float fill = 0.0f) {
    if (n >= N) return load(p);
    alignas(32) float tmp[N];
    for (int i = 0; i < N; ++i) tmp[i] = i < n ? to_float(p[i]) : fill;
    return {_mm256_load_ps(tmp)};
  }

  static void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(fp16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <typename T>
  void store_n(T* p, int n) const {
    if (n >= N) return store(p);
    alignas(32) float tmp[N];
    _mm256_store_ps(tmp, v);
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(tmp[i]);
  }

  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};

static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
static inline Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
static inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
static inline Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
static inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
static inline Mask operator!(Mask a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
static inline Mask mask_from_bits(uint32_t bits) {
  const __m256i lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))};
}
static inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }

// x * 2^n for integral n in [-252, 254], in two steps so that neither factor leaves the normal range.
static inline Vec scale_by_pow2(Vec x, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
static inline Vec round_nearest(Vec x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#else  // generic: four lanes, for which the compiler uses the baseline SIMD

struct Mask {
  int32_t m[4];  // 0 or -1
  bool any() const { return m[0] | m[1] | m[2] | m[3]; }
  uint32_t bits() const { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
};

struct Vec {
  static constexpr int N = 4;
  float v[4];

  static Vec set(float x) { return {{x, x, x, x}}; }
  static Vec zero() { return set(0.0f); }
  static Vec iota() { return {{0, 1, 2, 3}}; }
  template <typename T>
  static Vec load(const T* p) {
    return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  template <typename T>
  static Vec load_n(const T* p, int n, float fill = 0.0f) {
    Vec r = set(fill);
    for (int i = 0; i < N && i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  static void load_pairs(const bf16* p, Vec& even, Vec& odd) {
    for (int i = 0; i < N; ++i) {
      even.v[i] = to_float(p[2 * i]);
      odd.v[i] = to_float(p[2 * i + 1]);
    }
  }
  template <typename T>
  void store(T* p) const {
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(v[i]);
  }
  template <typename T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < N && i < n; ++i) p[i] = from_float<T>(v[i]);
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float max() const {
    const float a = v[0] > v[2] ? v[0] : v[2];
    const float b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
};

// clang-format off
#define TD_LANEWISE(expr)                       \
  {                                             \
    Vec r;                                      \
    for (int i = 0; i < 4; ++i) r.v[i] = expr;  \
    return r;                                   \
  }
#define TD_COMPARE(expr)                             \
  {                                                  \
    Mask r;                                          \
    for (int i = 0; i < 4; ++i) r.m[i] = -int(expr); \
    return r;                                        \
  }
static inline Vec operator+(Vec a, Vec b) TD_LANEWISE(a.v[i] + b.v[i])
static inline Vec operator-(Vec a, Vec b) TD_LANEWISE(a.v[i] - b.v[i])
static inline Vec operator*(Vec a, Vec b) TD_LANEWISE(a.v[i] * b.v[i])
static inline Vec operator/(Vec a, Vec b) TD_LANEWISE(a.v[i] / b.v[i])
static inline Vec fma(Vec a, Vec b, Vec c) TD_LANEWISE(a.v[i] * b.v[i] + c.v[i])
// The second operand wins when either is NaN, as in x86 maxps/minps.
static inline Vec max(Vec a, Vec b) TD_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i])
static inline Vec min(Vec a, Vec b) TD_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i])
static inline Mask operator>(Vec a, Vec b) TD_COMPARE(a.v[i] > b.v[i])
static inline Mask operator>=(Vec a, Vec b) TD_COMPARE(a.v[i] >= b.v[i])
static inline Mask operator<(Vec a, Vec b) TD_COMPARE(a.v[i] < b.v[i])
static inline Mask is_nan(Vec a) TD_COMPARE(a.v[i] != a.v[i])
static inline Mask operator&(Mask a, Mask b) TD_COMPARE((a.m[i] & b.m[i]) != 0)
static inline Mask operator|(Mask a, Mask b) TD_COMPARE((a.m[i] | b.m[i]) != 0)
static inline Mask operator!(Mask a) TD_COMPARE(a.m[i] == 0)
static inline Mask mask_from_bits(uint32_t bits) TD_COMPARE(((bits >> i) & 1u) != 0)
static inline Vec select(Mask m, Vec yes, Vec no) TD_LANEWISE(m.m[i] ? yes.v[i] : no.v[i])
static inline Vec scale_by_pow2(Vec x, Vec n) TD_LANEWISE(std::ldexp(x.v[i], static_cast<int>(n.v[i])))
static inline Vec round_nearest(Vec x) TD_LANEWISE(std::nearbyint(x.v[i]))
#undef TD_LANEWISE
#undef TD_COMPARE
// clang-format on

#endif

static inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
static inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// exp to about 1 ulp: 2^n * p(r), r = x - n ln 2 in two pieces (Cody and Waite), p of degree 6 (minimax on
// [-ln2/2, ln2/2]). Below about -87.3 the result is exactly 0, so exp(-inf) = 0; exp(+inf) = +inf, and NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec clamped = min(Vec::set(88.8f), max(Vec::set(-126.0f), x));  // operands in this order keep finite lanes only
  const Vec n = round_nearest(clamped * Vec::set(1.44269504088896341f));
  Vec r = fma(n, Vec::set(-0.693359375f), clamped);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec p = Vec::set(1.9875691500e-4f);
  p = fma(p, r, Vec::set(1.3981999507e-3f));
  p = fma(p, r, Vec::set(8.3334519073e-3f));
  p = fma(p, r, Vec::set(4.1665795894e-2f));
  p = fma(p, r, Vec::set(1.6666665459e-1f));
  p = fma(p, r, Vec::set(5.0000001201e-1f));
  p = fma(p * r, r, r) + Vec::set(1.0f);
  Vec y = scale_by_pow2(p, n);
  y = select(x < Vec::set(-87.33654f), Vec::zero(), y);
  y = select(x > Vec::set(88.72283f), Vec::set(std::numeric_limits<float>::infinity()), y);
  return select(is_nan(x), x, y);
}

}  // namespace treedecode::cpu::TD_ISA
