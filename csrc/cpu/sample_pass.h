// What sample knows about a row before it chooses: a probe of a few lines, and the one pass that reads it from memory.
#pragma once

#include "border.h"
#include "candidates.h"
#include "sample.h"

namespace treedecode::cpu::TD_ISA {

constexpr int64_t kBlock = SampleScratch::kBlock;
constexpr int kBars = SampleScratch::kBars;

template <typename T, bool Masked>
struct Row {
  const T* x;           // [vocab]
  const int32_t* mask;  // [ceil(vocab / 32)] or nullptr
  int64_t vocab;

  Vec allowed(Vec v, int64_t i) const {
    if constexpr (Masked) return select(allowed_lanes(mask, i), v, Vec::set(-kInf));
    return v;
  }
  Vec load(int64_t i) const { return allowed(Vec::load(x + i), i); }
  // Only `left` of the lanes exist, if any.
  Vec load_n(int64_t i, int64_t left) const {
    if (left <= 0) return Vec::set(-kInf);
    return left >= Vec::N ? load(i) : allowed(Vec::load_n(x + i, static_cast<int>(left), -kInf), i);
  }
  // visit(v, i) for all lanes of [begin, end), begin a multiple of Vec::N; lanes past the end are -inf.
  template <typename Visit>
  inline __attribute__((always_inline)) void each(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t i = begin;
    for (; i + Vec::N <= end; i += Vec::N) visit(load(i), i);
    if (i < end) visit(load_n(i, end - i), i);
  }
  // The same with kWide registers at once, whose lanes are in any order.
  template <typename Visit>
  inline __attribute__((always_inline)) void each_wide(int64_t begin, int64_t end, const Visit& visit) const {
    Vec v[kWide];
    int64_t i = begin;
    for (; i + kWide * Vec::N <= end; i += kWide * Vec::N) {
      if constexpr (Masked) {
        for (int j = 0; j < kWide; ++j) v[j] = load(i + j * Vec::N);
      } else {
        load_wide(x + i, v);
      }
      visit(v, i);
    }
    if (i == end) return;
    for (int j = 0; j < kWide; ++j) v[j] = load_n(i + j * Vec::N, end - i - j * Vec::N);
    visit(v, i);
  }
};

struct Sums {
  double sum = 0;            // of exp(x - ref)
  double log_sum = 0;        // of exp(x - ref) * (x - ref) / ln 2
  double mass = 0;           // of exp((x - ref) / temperature)
  double above[kBars] = {};  // the part of mass from tokens above each bar
  int64_t num_in_band = 0;   // tokens in (bars[1], bars[0]]
  float top = -kInf;
};

enum class Collect { kNothing, kBars, kCandidates };

// Splits a stream of logits at two bars: masses above them, and the tokens between them.
struct Split {
  Vec upper, lower;
  float* band;
  Vec above_upper = Vec::zero(), above_lower = Vec::zero();

  Split(const float bars[kBars], float* to) : upper(Vec::set(bars[0])), lower(Vec::set(bars[1])), band(to) {}

  inline __attribute__((always_inline)) void add(const Vec (&v)[kWide], const Vec (&mass)[kWide]) {
    for (int j = 0; j < kWide; ++j) {
      const Mask over = v[j] > upper, kept = v[j] > lower;
      above_upper = add_if(over, above_upper, mass[j]);
      above_lower = add_if(kept, above_lower, mass[j]);
      band += compress(band, v[j], kept & !over);
    }
  }
  void end_block(int64_t block, const SampleScratch& scratch, Sums& out) {
    const double above[kBars] = {above_upper.sum(), above_lower.sum()};
    above_upper = above_lower = Vec::zero();
    for (int bar = 0; bar < kBars; ++bar) {
      scratch.above[block * kBars + bar] = above[bar];
      out.above[bar] += above[bar];
    }
    scratch.ends[block] = band - scratch.band;
    out.num_in_band = band - scratch.band;
  }
};

// Splits a row at the bars, where the first pass could not.
template <typename R>
void split_row(const R& row, float ref, float scale, const float* bars, const SampleScratch& scratch, Sums& out) {
  Split split(bars, scratch.band);
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    row.each_wide(begin, end, [&](const Vec(&v)[kWide], int64_t) __attribute__((always_inline)) {
      Vec w[kWide];
      for (int j = 0; j < kWide; ++j) w[j] = (v[j] - Vec::set(ref)) * Vec::set(scale);
      exp2_inplace(w);
      split.add(v, w);
    });
    split.end_block(begin / kBlock, scratch, out);
  }
}

// The pass that reads the row from memory.
template <Collect C, bool Tempered, typename R>
Sums sum_row(const R& row, float ref, float inv_temperature, const float* bars, const SampleScratch& scratch,
             Candidates* candidates) {
  Sums out;
  Split split(bars, scratch.band);
  Vec top = Vec::set(-kInf);
  const Vec base = Vec::set(ref), scale = Vec::set(kLog2E), inverse = Vec::set(inv_temperature);
  const int64_t len = C == Collect::kCandidates ? Candidates::block_len(candidates->k) : kBlock;
  for (int64_t begin = 0; begin < row.vocab; begin += len) {
    const int64_t end = begin + len < row.vocab ? begin + len : row.vocab;
    if constexpr (C == Collect::kCandidates)
      candidates->begin_block(begin, end, [&](int64_t i) { return row.load(i); });
    Vec s = Vec::zero(), e = Vec::zero(), z = Vec::zero();
    row.each_wide(begin, end, [&](const Vec(&v)[kWide], int64_t i) __attribute__((always_inline)) {
      Vec t[kWide], w[kWide], u[kWide];
      Vec m = v[0];
      for (int j = 1; j < kWide; ++j) m = max(m, v[j]);
      top = max(m, top);
      for (int j = 0; j < kWide; ++j) {
        t[j] = (v[j] - base) * scale;
        u[j] = t[j] * inverse;
        w[j] = t[j] = max(Vec::set(-200.0f), t[j]);  // in log_sum, 0 * -inf would be NaN
      }
      exp2_inplace(w);
      for (int j = 0; j < kWide; ++j) {
        s += w[j];
        e = fma(w[j], t[j], e);
      }
      if constexpr (Tempered) {
        exp2_inplace(u);
        for (int j = 0; j < kWide; ++j) z += u[j];
      } else {
        for (int j = 0; j < kWide; ++j) u[j] = w[j];
      }
      if constexpr (C == Collect::kBars) split.add(v, u);
      if constexpr (C == Collect::kCandidates) {
        if (__builtin_expect((m > Vec::set(candidates->threshold)).any(), 0)) {
          for (int j = 0; j < kWide; ++j) {
            const int64_t at = i + j * Vec::N;
            const Vec x = row.load_n(at, end - at);
            const uint32_t lanes = (x > Vec::set(candidates->threshold)).bits();
            if (lanes) candidates->insert(x, lanes, at);
          }
        }
      }
    });
    const double sum = s.sum();
    out.sum += sum;
    out.log_sum += e.sum();
    const double mass = Tempered ? static_cast<double>(z.sum()) : sum;
    out.mass += mass;
    if constexpr (C == Collect::kNothing) scratch.masses[begin / kBlock] = mass;
    if constexpr (C == Collect::kBars) split.end_block(begin / kBlock, scratch, out);
  }
  out.top = top.max();
  return out;
}

// A few cache lines of the row, evenly spread: enough to guess where its maximum and the nucleus' border are. The
// guess decides what the passes cost, never what comes out.
struct Probe {
  static constexpr int64_t kRuns = 64, kRunLen = 32;
  float x[kRuns * kRunLen];
  int64_t n = 0;
  float top = -kInf;

  template <typename R>
  explicit Probe(const R& row) {
    Vec m = Vec::set(-kInf);
    const auto take = [&](Vec v, int64_t) {
      m = max(v, m);
      v.store(x + n);
      n += Vec::N;
    };
    if (row.vocab <= kRuns * kRunLen) {
      row.each(0, row.vocab, take);
    } else {
      for (int64_t r = 0; r < kRuns; ++r) {
        const int64_t begin = row.vocab / kRunLen * r / kRuns * kRunLen;
        row.each(begin, begin + kRunLen, take);
      }
    }
    top = m.max();
  }

  // The probe's masses by value, in equal bins of t = log2 of the mass, from 0 (the probe's maximum) downwards.
  struct Masses {
    static constexpr int kBins = 1024;
    float mass[kBins] = {};
    float bins_per_bit;
    float total;
    bool many;  // so many tokens carry the total that it is representative of the row's
  };

  void weigh(float scale, Masses& out) const {
    Vec least = Vec::zero(), sum = Vec::zero(), squares = Vec::zero();
    for (int64_t i = 0; i < n; i += Vec::N) {
      const Vec t = (Vec::load(x + i) - Vec::set(top)) * Vec::set(scale);
      const Vec w = exp2(t);
      sum += w;
      squares = fma(w, w, squares);
      least = min(select(t > Vec::set(-32.0f), t, Vec::zero()), least);
    }
    const float range = (Vec::zero() - least).max();
    out.bins_per_bit = (Masses::kBins - 2) / (range > 0 ? range : 1.0f);
    out.total = sum.sum();
    out.many = out.total * out.total > 200.0f * squares.sum();
    for (int64_t i = 0; i < n; i += Vec::N) {
      float bin[Vec::N], weight[Vec::N];
      const Vec t = (Vec::load(x + i) - Vec::set(top)) * Vec::set(scale);
      exp2(t).store(weight);
      min(Vec::set(Masses::kBins - 1.0f), t * Vec::set(-out.bins_per_bit)).store(bin);
      for (int lane = 0; lane < Vec::N; ++lane) {
        // NaN and -inf end up in the last bin.
        out.mass[bin[lane] >= 0.0f ? static_cast<int>(bin[lane]) : Masses::kBins - 1] += weight[lane];
      }
    }
  }

  // Two bars around the value below which `tail` of mass is expected.
  void bars(const Masses& m, float tail, float scale, float out[kBars]) const {
    constexpr float kShare[kBars] = {1.2f, 0.85f};
    float below = 0;
    int bin = Masses::kBins - 1;
    for (int bar = kBars - 1; bar >= 0; --bar) {
      for (; bin > 0 && below + m.mass[bin] <= kShare[bar] * tail; --bin) below += m.mass[bin];
      out[bar] = top - static_cast<float>(bin + bar) / (m.bins_per_bit * scale);
    }
  }
};

}  // namespace treedecode::cpu::TD_ISA
