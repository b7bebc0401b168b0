// Building blocks of attention over one tile of keys: packing, a register-blocked product, and 2^x.
//
// Everything packed is counted in *units* of four bytes: one fp32 value, or (Pairs) two neighbouring bf16 values that
// `vdpbf16ps` multiplies and adds at once. Both products of attention then have one shape,
//   c[row][lane] (+)= sum_u a[row][u] * b[u][lane],
// with a's unit broadcast over lanes. Lanes are keys in q k^T, and dimensions in p v.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace treedecode::cpu::TD_ISA {

// Accumulators are kRows x kCols registers: 24 of 32 with AVX-512, 12 of 16 otherwise.
constexpr int kRows = 6;
#if defined(TD_ISA_AVX512)
constexpr int kCols = 4;
#else
constexpr int kCols = 2;
#endif
constexpr int kPanel = kCols * Vec::N;  // lanes of one packed panel of b

#if defined(TD_ISA_AVX512_BF16)
constexpr bool kHavePairs = true;
#else
constexpr bool kHavePairs = false;
#endif

static inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

template <bool Pairs>
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(TD_ISA_AVX512_BF16)
  if constexpr (Pairs)
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
#endif
  return fma(a, b, c);
}

template <bool Pairs, int Rows, int Cols>
static void multiply_block(const float* a,        // [Rows, depth] units, row stride a_stride
                           int64_t a_stride,      //
                           const float* b,        // [depth, kPanel] units
                           int64_t depth,         //
                           const float* rescale,  // [Rows] factor of the old c, or null: c begins at 0
                           float* c,              // [Rows, Cols * N], row stride c_stride
                           int64_t c_stride) {
  Vec acc[Rows][Cols];
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Cols; ++j) {
      acc[r][j] = rescale ? Vec::load(c + r * c_stride + j * Vec::N) * Vec::set(rescale[r]) : Vec::zero();
    }
  }
  for (int64_t u = 0; u < depth; ++u) {
    Vec bv[Cols];
#pragma GCC unroll 4
    for (int j = 0; j < Cols; ++j) bv[j] = Vec::load(b + u * kPanel + j * Vec::N);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec av = Vec::set(a[r * a_stride + u]);
#pragma GCC unroll 4
      for (int j = 0; j < Cols; ++j) acc[r][j] = multiply_add<Pairs>(av, bv[j], acc[r][j]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Cols; ++j) acc[r][j].store(c + r * c_stride + j * Vec::N);
  }
}

template <bool Pairs, int Cols>
static void multiply_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t depth,
                          const float* rescale, float* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_block<Pairs, kRows, Cols>(a + r * a_stride, a_stride, b, depth, rescale ? rescale + r : nullptr,
                                       c + r * c_stride, c_stride);
  }
  a += r * a_stride;
  c += r * c_stride;
  if (rescale) rescale += r;
  switch (rows - r) {
    case 5: return multiply_block<Pairs, 5, Cols>(a, a_stride, b, depth, rescale, c, c_stride);
    case 4: return multiply_block<Pairs, 4, Cols>(a, a_stride, b, depth, rescale, c, c_stride);
    case 3: return multiply_block<Pairs, 3, Cols>(a, a_stride, b, depth, rescale, c, c_stride);
    case 2: return multiply_block<Pairs, 2, Cols>(a, a_stride, b, depth, rescale, c, c_stride);
    case 1: return multiply_block<Pairs, 1, Cols>(a, a_stride, b, depth, rescale, c, c_stride);
    default: return;
  }
}

// Multiplies any number of rows by one panel of b, which stays in L1 meanwhile.
template <bool Pairs>
static void multiply_panel(int64_t rows, int64_t cols, const float* a, int64_t a_stride, const float* b, int64_t depth,
                           const float* rescale, float* c, int64_t c_stride) {
  switch (cols) {
    case 1: return multiply_rows<Pairs, 1>(rows, a, a_stride, b, depth, rescale, c, c_stride);
    case 2: return multiply_rows<Pairs, 2>(rows, a, a_stride, b, depth, rescale, c, c_stride);
#if defined(TD_ISA_AVX512)
    case 3: return multiply_rows<Pairs, 3>(rows, a, a_stride, b, depth, rescale, c, c_stride);
    case 4: return multiply_rows<Pairs, 4>(rows, a, a_stride, b, depth, rescale, c, c_stride);
#endif
    default: return;
  }
}

// Transposes N x N units of 32 bits in registers.
static inline void transpose(Vec (&r)[Vec::N]) {
#if defined(TD_ISA_AVX512)
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  for (int i = 0; i < 16; i += 4) {
    u[i] = low(t[i], t[i + 2]);
    u[i + 1] = high(t[i], t[i + 2]);
    u[i + 2] = low(t[i + 1], t[i + 3]);
    u[i + 3] = high(t[i + 1], t[i + 3]);
  }
  // u[4i + j], 128-bit lane l: column 4l + j of rows 4i .. 4i+3.
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88),
                 even23 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd),
                 odd23 = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#elif defined(TD_ISA_AVX2)
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
#else
  for (int i = 0; i < Vec::N; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
  }
#endif
}

// Loads up to N units of one row of values from unit `u` on; units past `units` are 0.
template <bool Pairs, typename T>
static inline Vec load_units(const T* row, int64_t u, int64_t units) {
  const int n = units - u < Vec::N ? static_cast<int>(units - u) : Vec::N;
  if constexpr (Pairs) {
    const float* p = reinterpret_cast<const float*>(row) + u;
    return n == Vec::N ? Vec::load(p) : Vec::load_n(p, n);
  } else {
    return n == Vec::N ? Vec::load(row + u) : Vec::load_n(row + u, n);
  }
}

// Copies a query row, as it is (Pairs) or widened to fp32.
template <bool Pairs, typename T>
static inline void pack_row(const T* row, int64_t units, float* out /* [units] */) {
  for (int64_t u = 0; u < units; u += Vec::N) {
    const int64_t n = units - u < Vec::N ? units - u : Vec::N;
    load_units<Pairs>(row, u, units).store_n(out + u, static_cast<int>(n));
  }
}

// Packs keys transposed, so that lanes are tokens. Tokens whose row is null, and those past num_tokens up to a whole
// register, become 0.
template <bool Pairs, typename T>
static void pack_keys(const T* const* rows,  // [num_tokens] each [head_dim]
                      const T* const* next,  // [num_next] rows to prefetch meanwhile
                      int64_t num_tokens, int64_t num_next, int64_t units,
                      float* out) {  // [ceil(num_tokens / kPanel), units, kPanel]
  constexpr int64_t kUnitsPerLine = 64 / (Pairs ? 4 : static_cast<int64_t>(sizeof(T)));
  for (int64_t t = 0; t < num_tokens; t += Vec::N) {
    float* panel = out + t / kPanel * units * kPanel + t % kPanel;
    for (int64_t i = t; i < t + Vec::N && i < num_next; ++i) {
      if (!next[i]) continue;
      for (int64_t u = 0; u < units; u += kUnitsPerLine) {
        prefetch_l2(Pairs ? static_cast<const void*>(reinterpret_cast<const float*>(next[i]) + u) : next[i] + u);
      }
    }
    const int64_t count = num_tokens - t < Vec::N ? num_tokens - t : Vec::N;
    for (int64_t u = 0; u < units; u += Vec::N) {
      Vec r[Vec::N];
      for (int i = 0; i < Vec::N; ++i)
        r[i] = i < count && rows[t + i] ? load_units<Pairs>(rows[t + i], u, units) : Vec::zero();
      transpose(r);
      const int n = units - u < Vec::N ? static_cast<int>(units - u) : Vec::N;
      for (int i = 0; i < n; ++i) r[i].store(panel + (u + i) * kPanel);
    }
  }
}

// Packs values, so that lanes are dimensions. A unit holds the value of one token, or (Pairs) those of tokens 2u and
// 2u + 1. Tokens whose row is null, and those past num_tokens up to a multiple of N units, become 0; so do dimensions
// past head_dim up to a whole register.
template <bool Pairs, typename T>
static void pack_values(const T* const* rows, const T* const* next, int64_t num_tokens, int64_t num_next,
                        int64_t head_dim,
                        int64_t panel_stride,  // units between panels
                        float* out) {          // [ceil(head_dim / kPanel), tokens, kPanel]
  constexpr int kStep = Pairs ? 2 : 1;
  const int64_t padded = (num_tokens + kStep * Vec::N - 1) / (kStep * Vec::N) * kStep * Vec::N;
  constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t t = 0; t < padded; t += kStep) {
    for (int64_t i = t; i < t + kStep && i < num_next; ++i) {
      if (!next[i]) continue;
      for (int64_t d = 0; d < head_dim; d += kPerLine) prefetch_l2(next[i] + d);
    }
    const T* row = t < num_tokens ? rows[t] : nullptr;
    float* line = out + t / kStep * kPanel;
#if defined(TD_ISA_AVX512_BF16)
    if constexpr (Pairs) {
      const T* second = t + 1 < num_tokens ? rows[t + 1] : nullptr;
      // Interleaves the tokens' 16-bit values: (x0, y0), (x1, y1), ...
      alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
      const __m512i low = _mm512_load_si512(kLow);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (int64_t d = 0; d < head_dim; d += 32) {
        const int64_t n = head_dim - d < 32 ? head_dim - d : 32;
        const __mmask32 mask = n == 32 ? 0xffffffffu : (1u << n) - 1u;
        const __m512i x = row ? _mm512_maskz_loadu_epi16(mask, row + d) : _mm512_setzero_si512();
        const __m512i y = second ? _mm512_maskz_loadu_epi16(mask, second + d) : _mm512_setzero_si512();
        float* to = line + d / kPanel * panel_stride + d % kPanel;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
        if (n > 16) _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(x, high, y));
      }
      continue;
    }
#endif
    for (int64_t d = 0; d < head_dim; d += Vec::N) {
      const Vec v = row ? load_units<false>(row, d, head_dim) : Vec::zero();
      v.store(line + d / kPanel * panel_stride + d % kPanel);
    }
  }
}

// Returns 2^(x - base) to 2 ulp, for a whole number `base` and x up to about base: 2^(floor(x) - base) * p(x -
// floor(x)), with p of degree 5 and p(0) = 1 (minimax of the relative error on [0, 1], 1e-7). The digits depend on x
// alone. Results below 2^-126 are 0; NaN stays NaN.
static inline Vec exp2_above(Vec x, Vec base) {
#if defined(TD_ISA_AVX512)
  const Vec r{_mm512_reduce_ps(x.v, 0x09)};
  const Vec whole{_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#else
  const Vec clamped = max(base + Vec::set(-126.0f), x);
  const Vec nearest = round_nearest(clamped);
  const Vec whole = nearest - select(nearest > clamped, Vec::set(1.0f), Vec::zero());
  const Vec r = clamped - whole;
#endif
  Vec p = Vec::set(1.867130079e-3f);
  p = fma(p, r, Vec::set(9.017030296e-3f));
  p = fma(p, r, Vec::set(5.579991313e-2f));
  p = fma(p, r, Vec::set(2.401644501e-1f));
  p = fma(p, r, Vec::set(6.931513118e-1f));
  p = fma(p, r, Vec::set(1.0f));
#if defined(TD_ISA_AVX512)
  return {_mm512_scalef_ps(p.v, (whole - base).v)};
#else
  return select(x < base + Vec::set(-126.0f), Vec::zero(), scale_by_pow2(p, whole - base));
#endif
}

// Returns tanh(x) to about 2 ulp: x * p(x^2) for small |x|, where 1 - 2 / (e^2x + 1) would cancel.
static inline Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = Vec::set(-5.704986925e-3f);
  p = fma(p, z, Vec::set(2.063908716e-2f));
  p = fma(p, z, Vec::set(-5.373971505e-2f));
  p = fma(p, z, Vec::set(1.333144220e-1f));
  p = fma(p, z, Vec::set(-3.333328194e-1f));
  const Vec small = fma(p * z, x, x);
  const Vec large = Vec::set(1.0f) - Vec::set(2.0f) / (exp(x + x) + Vec::set(1.0f));
  const Vec limit = Vec::set(0.625f);
  return select((x < limit) & (x > Vec::zero() - limit), small, large);
}

}  // namespace treedecode::cpu::TD_ISA
