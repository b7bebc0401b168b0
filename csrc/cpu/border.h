// Finds the last token that top-k or top-p keeps of a row, without sorting it.
#pragma once

#include <cmath>
#include <limits>

#include "exp2.h"
#include "select.h"

namespace treedecode::cpu::TD_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBorderBlock = 2048;  // elements summed in fp32 before the sum goes into a double
constexpr int kSplits = 7;

static inline Vec add_if(Mask m, Vec sum, Vec x) {
#if defined(TD_ISA_AVX512)
  return {_mm512_mask_add_ps(sum.v, m.m, sum.v, x.v)};
#else
  return sum + select(m, x, Vec::zero());
#endif
}

// Writes the chosen lanes side by side, and may overwrite Vec::N floats from `to` on. Returns how many are chosen.
static inline int compress(float* to, Vec x, Mask m) {
#if defined(TD_ISA_AVX512)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(m.m, x.v));
  return __builtin_popcount(m.m);
#else
  float value[Vec::N];
  x.store(value);
  int n = 0;
  for (uint32_t lanes = m.bits(); lanes; lanes &= lanes - 1) to[n++] = value[__builtin_ctz(lanes)];
  return n;
#endif
}

// Calls visit(v) for n floats; lanes past the end are `fill`.
template <typename Visit>
static inline __attribute__((always_inline)) void each_of(const float* x, int64_t n, float fill, const Visit& visit) {
  int64_t i = 0;
  for (; i + Vec::N <= n; i += Vec::N) visit(Vec::load(x + i));
  if (i < n) visit(Vec::load_n(x + i, static_cast<int>(n - i), fill));
}

// The border of a filter, which keeps every token above `value` and the first `ties` of those equal to it.
struct Border {
  float value = -kInf;
  int64_t ties = std::numeric_limits<int64_t>::max();
};

// Returns the border of the fewest best tokens whose masses reach `target`. x are the tokens that the border can be at,
// n > 0, in any order; `base` is the mass of the tokens above them. The mass of a token is 2^((x - ref) * scale), or 1.
// An eight-way search by value: each round keeps the eighth of the range that the border is in.
template <bool Mass>
Border find_border(const float* x /* [n] */, float* work /* [n + Vec::N], may be x */, int64_t n, double base,
                   double target, float ref, float scale) {
  constexpr int64_t kFew = 48;
  uint64_t keys[kFew];
  const auto weight_of = [&](float v) -> double {
    if constexpr (!Mass) return 1.0;
    return std::exp2(static_cast<double>((v - ref) * scale));
  };
  const auto border_at = [&](float value, int64_t count) {
    const double weight = weight_of(value);
    const double wanted = std::ceil((target - base) / weight);
    const int64_t ties = wanted >= 1 ? (wanted < static_cast<double>(count) ? static_cast<int64_t>(wanted) : count) : 1;
    return Border{value, ties};
  };
  while (n > kFew) {
    Vec low = Vec::set(kInf), high = Vec::set(-kInf);
    each_of(x, n, kInf, [&](Vec v) { low = min(v, low); });
    each_of(x, n, -kInf, [&](Vec v) { high = max(v, high); });
    const float lowest = -(Vec::zero() - low).max(), highest = high.max();
    if (lowest == highest) return border_at(lowest, n);
    float split[kSplits];
    // A sum of shares, since the difference of two large finite numbers may overflow.
    for (int j = 0; j < kSplits; ++j) {
      const float share = static_cast<float>(kSplits - j) / (kSplits + 1);
      split[j] = lowest * (1 - share) + highest * share;
      if (!(split[j] < highest)) split[j] = lowest;  // rounded up to the highest: no token would be above it
    }
    double above[kSplits] = {};
    for (int64_t begin = 0; begin < n; begin += kBorderBlock) {
      Vec a[kSplits];
      for (int j = 0; j < kSplits; ++j) a[j] = Vec::zero();
      each_of(x + begin, n - begin < kBorderBlock ? n - begin : kBorderBlock, -kInf,
              [&](Vec v) __attribute__((always_inline)) {
                const Vec w = Mass ? exp2((v - Vec::set(ref)) * Vec::set(scale)) : Vec::set(1.0f);
                for (int j = 0; j < kSplits; ++j) a[j] = add_if(v > Vec::set(split[j]), a[j], w);
              });
      for (int j = 0; j < kSplits; ++j) above[j] += a[j].sum();
    }
    int j = 0;
    while (j < kSplits && base + above[j] < target) ++j;
    const float hi = j > 0 ? split[j - 1] : kInf, lo = j < kSplits ? split[j] : -kInf;
    if (j > 0) base += above[j - 1];
    float* to = work;  // may be x: everything that is overwritten has been read before
    each_of(x, n, -kInf, [&](Vec v) __attribute__((always_inline)) {
      to += compress(to, v, (v > Vec::set(lo)) & (Vec::set(hi) >= v));
    });
    x = work;
    n = to - work;
  }
  for (int64_t i = 0; i < n; ++i) keys[i] = make_key(x[i], static_cast<uint32_t>(i));
  sort_descending(keys, n);
  for (int64_t i = 0;;) {
    const float value = key_value(keys[i]);
    int64_t count = 1;
    while (i + count < n && key_value(keys[i + count]) == value) ++count;
    const double weight = static_cast<double>(count) * weight_of(value);
    if (base + weight >= target || i + count == n) return border_at(value, count);
    base += weight;
    i += count;
  }
}

}  // namespace treedecode::cpu::TD_ISA
