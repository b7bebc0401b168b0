// Passes of sample over a row: a probe of a few cache lines, and the one pass that reads the row from memory.
#pragma once

#include "border.h"
#include "candidates.h"
#include "sample.h"

namespace treedecode::cpu::TD_ISA {

constexpr int64_t kBlock = SampleScratch::kBlock;
constexpr int kThresholds = SampleScratch::kThresholds;

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
  // The first `n` of the lanes, if any; the others are -inf.
  Vec load_n(int64_t i, int64_t n) const {
    if (n <= 0) return Vec::set(-kInf);
    return n >= Vec::N ? load(i) : allowed(Vec::load_n(x + i, static_cast<int>(n), -kInf), i);
  }
  // Calls visit(v, i) for all lanes of [begin, end), begin a multiple of Vec::N; lanes past the end are -inf.
  template <typename Visit>
  inline __attribute__((always_inline)) void each(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t i = begin;
    for (; i + Vec::N <= end; i += Vec::N) visit(load(i), i);
    if (i < end) visit(load_n(i, end - i), i);
  }
  // Calls visit(v, i) with kWide registers at once, whose lanes are in any order.
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
  double sum = 0;                  // of exp(x - ref)
  double log_sum = 0;              // of exp(x - ref) * (x - ref) / ln 2
  double mass = 0;                 // of exp((x - ref) / temperature)
  double above[kThresholds] = {};  // the part of mass from tokens above each threshold
  int64_t num_in_band = 0;         // tokens in (thresholds[1], thresholds[0]]
  float max = -kInf;
};

enum class Collect { kNothing, kBand, kCandidates };

// Splits a stream of logits at two thresholds: adds up the masses above them, and stores the logits between them.
struct Split {
  Vec upper, lower;
  float* band;
  Vec above_upper = Vec::zero(), above_lower = Vec::zero();

  Split(const float thresholds[kThresholds], float* to)
      : upper(Vec::set(thresholds[0])), lower(Vec::set(thresholds[1])), band(to) {}

  inline __attribute__((always_inline)) void add(const Vec (&v)[kWide], const Vec (&mass)[kWide]) {
    for (int j = 0; j < kWide; ++j) {
      const Mask over_upper = v[j] > upper, over_lower = v[j] > lower;
      above_upper = add_if(over_upper, above_upper, mass[j]);
      above_lower = add_if(over_lower, above_lower, mass[j]);
      band += compress(band, v[j], over_lower & !over_upper);
    }
  }
  void end_block(int64_t block, const SampleScratch& scratch, Sums& out) {
    const double above[kThresholds] = {above_upper.sum(), above_lower.sum()};
    above_upper = above_lower = Vec::zero();
    for (int i = 0; i < kThresholds; ++i) {
      scratch.above[block * kThresholds + i] = above[i];
      out.above[i] += above[i];
    }
    scratch.ends[block] = band - scratch.band;
    out.num_in_band = band - scratch.band;
  }
};

// Splits a row at thresholds that the first pass did not have.
template <typename R>
void split_row(const R& row, float ref, float scale, const float* thresholds, const SampleScratch& scratch, Sums& out) {
  Split split(thresholds, scratch.band);
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

// Reads the row from memory, and adds up its sums.
template <Collect C, bool Tempered, typename R>
Sums sum_row(const R& row, float ref, float inv_temperature, const float* thresholds, const SampleScratch& scratch,
             Candidates* candidates) {
  Sums out;
  Split split(thresholds, scratch.band);
  Vec row_max = Vec::set(-kInf);
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
      row_max = max(m, row_max);
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
      if constexpr (C == Collect::kBand) split.add(v, u);
      if constexpr (C == Collect::kCandidates) {
        if (__builtin_expect((m > Vec::set(candidates->threshold)).any(), 0)) {
          for (int j = 0; j < kWide; ++j) {
            const int64_t first = i + j * Vec::N;
            const Vec x = row.load_n(first, end - first);
            const uint32_t lanes = (x > Vec::set(candidates->threshold)).bits();
            if (lanes) candidates->insert(x, lanes, first);
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
    if constexpr (C == Collect::kBand) split.end_block(begin / kBlock, scratch, out);
  }
  out.max = row_max.max();
  return out;
}

// A few cache lines of the row, evenly spread, to guess its maximum and the border of the nucleus. The guess decides
// the cost of the passes, never their result.
struct Probe {
  static constexpr int64_t kRuns = 64, kRunLen = 32;
  float x[kRuns * kRunLen];
  int64_t n = 0;
  float max_logit = -kInf;

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
    max_logit = m.max();
  }

  // A histogram of the probe's masses by value, in equal bins of t = log2 of the mass, from 0 (its maximum) downwards.
  struct Masses {
    static constexpr int kBins = 1024;
    float mass[kBins] = {};
    float bins_per_bit;
    float total;
    bool is_representative;  // of the row, because many tokens carry the total
  };

  void fill(float scale, Masses& out) const {
    Vec min_t = Vec::zero(), sum = Vec::zero(), squares = Vec::zero();
    for (int64_t i = 0; i < n; i += Vec::N) {
      const Vec t = (Vec::load(x + i) - Vec::set(max_logit)) * Vec::set(scale);
      const Vec w = exp2(t);
      sum += w;
      squares = fma(w, w, squares);
      min_t = min(select(t > Vec::set(-32.0f), t, Vec::zero()), min_t);
    }
    const float range = (Vec::zero() - min_t).max();
    out.bins_per_bit = (Masses::kBins - 2) / (range > 0 ? range : 1.0f);
    out.total = sum.sum();
    out.is_representative = out.total * out.total > 200.0f * squares.sum();
    for (int64_t i = 0; i < n; i += Vec::N) {
      float bin[Vec::N], weight[Vec::N];
      const Vec t = (Vec::load(x + i) - Vec::set(max_logit)) * Vec::set(scale);
      exp2(t).store(weight);
      min(Vec::set(Masses::kBins - 1.0f), t * Vec::set(-out.bins_per_bit)).store(bin);
      for (int lane = 0; lane < Vec::N; ++lane) {
        // NaN and -inf are counted in the last bin.
        out.mass[bin[lane] >= 0.0f ? static_cast<int>(bin[lane]) : Masses::kBins - 1] += weight[lane];
      }
    }
  }

  // Sets two thresholds, above and below the value below which `tail` of mass is expected.
  void thresholds(const Masses& m, float tail, float scale, float out[kThresholds]) const {
    constexpr float kShare[kThresholds] = {1.2f, 0.85f};
    float below = 0;
    int bin = Masses::kBins - 1;
    for (int i = kThresholds - 1; i >= 0; --i) {
      for (; bin > 0 && below + m.mass[bin] <= kShare[i] * tail; --bin) below += m.mass[bin];
      out[i] = max_logit - static_cast<float>(bin + i) / (m.bins_per_bit * scale);
    }
  }
};

}  // namespace treedecode::cpu::TD_ISA
