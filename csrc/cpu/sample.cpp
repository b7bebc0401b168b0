#include "sample.h"

#include <cmath>
#include <limits>

#include "border.h"
#include "candidates.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
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
  // visit(v, i) for all lanes of [begin, end), begin a multiple of Vec::N; lanes past the end are -inf.
  template <typename Visit>
  inline __attribute__((always_inline)) void each(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t i = begin;
    for (; i + Vec::N <= end; i += Vec::N) visit(load(i), i);
    if (i < end) visit(allowed(Vec::load_n(x + i, static_cast<int>(end - i), -kInf), i), i);
  }
};

struct Sums {
  double sum = 0;      // of exp(x - ref)
  double log_sum = 0;  // of exp(x - ref) * (x - ref) / ln 2
  double mass = 0;     // of exp((x - ref) / temperature)
  double above[kBars] = {};  // the part of mass from tokens above each bar
  int64_t num_in_band = 0;   // tokens in (bars[2], bars[1]]
  float top = -kInf;
};

enum class Collect { kNothing, kBars, kCandidates };

// The pass that reads the row from memory.
template <Collect C, bool Tempered, typename R>
Sums sum_row(const R& row, float ref, float inv_temperature, const float* bars, const SampleScratch& scratch,
             Candidates* candidates) {
  Sums out;
  const Vec bar0 = Vec::set(bars[0]), bar1 = Vec::set(bars[1]), bar2 = Vec::set(bars[2]), bar3 = Vec::set(bars[3]);
  float* band = scratch.band;
  Vec top = Vec::set(-kInf);
  const Vec base = Vec::set(ref), scale = Vec::set(kLog2E), inverse = Vec::set(inv_temperature);
  const int64_t len = C == Collect::kCandidates ? Candidates::block_len(candidates->k) : kBlock;
  for (int64_t begin = 0; begin < row.vocab; begin += len) {
    const int64_t end = begin + len < row.vocab ? begin + len : row.vocab;
    if constexpr (C == Collect::kCandidates) candidates->begin_block(begin, end, [&](int64_t i) { return row.load(i); });
    Vec s = Vec::zero(), e = Vec::zero(), z = Vec::zero();
    Vec a0 = Vec::zero(), a1 = Vec::zero(), a2 = Vec::zero(), a3 = Vec::zero();
    row.each(begin, end, [&](Vec v, int64_t i) __attribute__((always_inline)) {
      top = max(v, top);
      const Vec t = (v - base) * scale;
      const Vec w = exp2(t);
      s += w;
      e = fma(w, max(Vec::set(-200.0f), t), e);  // 0 * -inf would be NaN
      Vec u = w;
      if constexpr (Tempered) {
        u = exp2(t * inverse);
        z += u;
      }
      if constexpr (C == Collect::kBars) {
        const Mask upper = v > bar1, lower = v > bar2;
        a0 = add_if(v > bar0, a0, u);
        a1 = add_if(upper, a1, u);
        a2 = add_if(lower, a2, u);
        a3 = add_if(v > bar3, a3, u);
        band += compress(band, v, lower & !upper);
      }
      if constexpr (C == Collect::kCandidates) {
        const Mask m = v > Vec::set(candidates->threshold);
        if (__builtin_expect(m.any(), 0)) candidates->insert(v, m.bits(), i);
      }
    });
    const double sum = s.sum();
    out.sum += sum;
    out.log_sum += e.sum();
    const double mass = Tempered ? static_cast<double>(z.sum()) : sum;
    out.mass += mass;
    if constexpr (C == Collect::kNothing) scratch.masses[begin / kBlock] = mass;
    if constexpr (C == Collect::kBars) {
      const double above[kBars] = {a0.sum(), a1.sum(), a2.sum(), a3.sum()};
      for (int bar = 0; bar < kBars; ++bar) {
        scratch.above[begin / kBlock * kBars + bar] = above[bar];
        out.above[bar] += above[bar];
      }
      scratch.ends[begin / kBlock] = band - scratch.band;
    }
  }
  out.top = top.max();
  out.num_in_band = band - scratch.band;
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

  // Four bars around the value below which `tail` of the probe's mass lies.
  void bars(double tail, float inv_temperature, float out[kBars]) const {
    constexpr int kBins = 1024, kBinsPerBit = 32;
    float mass[kBins] = {};
    Vec sum = Vec::zero();
    const float scale = kLog2E * inv_temperature;
    for (int64_t i = 0; i < n; i += Vec::N) {
      float bits[Vec::N], weight[Vec::N];
      const Vec t = (Vec::load(x + i) - Vec::set(top)) * Vec::set(scale);
      const Vec w = exp2(t);
      sum += w;
      w.store(weight);
      // NaN and -inf end up in the last bin.
      min(Vec::set(kBins - 1.0f), t * Vec::set(-1.0f * kBinsPerBit)).store(bits);
      for (int lane = 0; lane < Vec::N; ++lane) {
        const float bin = bits[lane];
        mass[bin >= 0.0f ? static_cast<int>(bin) : kBins - 1] += weight[lane];
      }
    }
    static constexpr double kShare[kBars] = {2.5, 1.2, 0.85, 0.4};
    const float total = sum.sum();
    float below = 0;
    int bin = kBins - 1;
    for (int bar = kBars - 1; bar >= 0; --bar) {
      const float share = static_cast<float>(kShare[bar] * tail) * total;
      for (; bin > 0 && below + mass[bin] <= share; --bin) below += mass[bin];
      out[bar] = top - static_cast<float>(bin + (bar < 2 ? 0 : 1)) / (kBinsPerBit * scale);
    }
  }
};

constexpr int64_t kMaxCandidates = 1024;  // a top_k up to this is found on the way, in the one pass

template <typename T, bool Masked>
struct RowSampler {
  Row<T, Masked> row;
  SampleSettings s;
  SampleScratch scratch;
  float ref;              // what exponentials are relative to: at most the row's maximum, and not far below it
  float inv_temperature;
  float scale;            // log2(e) / temperature
  Sums sums;
  Candidates candidates;
  bool weighed = false;  // scratch.masses (and ties) are what the filters keep

  int64_t num_blocks() const { return (row.vocab + kBlock - 1) / kBlock; }
  bool tempered() const { return s.temperature != 1.0f; }

  template <Collect C>
  Sums pass(const float* bars) {
    if (C == Collect::kCandidates) candidates = Candidates{scratch.keys, scratch.seeds, s.top_k};
    // Candidates are weighed later, alone.
    return tempered() && C != Collect::kCandidates
               ? sum_row<C, true>(row, ref, inv_temperature, bars, scratch, &candidates)
               : sum_row<C, false>(row, ref, 1.0f, bars, scratch, &candidates);
  }

  template <Collect C>
  void read(const float* bars) {
    sums = pass<C>(bars);
    const bool usable = sums.sum < 0x1p40 && sums.mass < 0x1p40 && sums.sum >= 0.5;
    if (usable || !(sums.top < kInf) || sums.top == -kInf) return;
    ref = sums.top;  // the probe missed tokens far above all others
    sums = pass<C>(bars);
  }

  double weight(float x) const { return std::exp(static_cast<double>(x - ref) * scale * kLn2); }

  // All tokens in (lo, hi], in token order.
  int64_t collect(float lo, float hi) {
    float* band = scratch.band;
    const Vec low = Vec::set(lo), high = Vec::set(hi);
    for (int64_t block = 0; block < num_blocks(); ++block) {
      const int64_t begin = block * kBlock, end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
      row.each(begin, end, [&](Vec v, int64_t) __attribute__((always_inline)) {
        band += compress(band, v, (v > low) & (high >= v));
      });
      scratch.ends[block] = band - scratch.band;
    }
    return band - scratch.band;
  }

  Border top_p_border(const float* bars) {
    const double target = static_cast<double>(s.top_p) * sums.mass;
    int bar = 0;
    while (bar < kBars && sums.above[bar] < target) ++bar;
    const int64_t n = bar == 2 ? sums.num_in_band  // as a rule: the probe's guess was right
                               : collect(bar < kBars ? bars[bar] : -kInf, bar > 0 ? bars[bar - 1] : kInf);
    if (n == 0) return {};  // top_p so near 1 that rounding has eaten the rest
    const double above = bar > 0 ? sums.above[bar - 1] : 0.0;
    const Border border = find_border<true>(scratch.band, scratch.work, n, above, target, ref, scale);
    weigh_band(border, bar);
    return border;
  }

  // What each block keeps: what the first pass found above the band, and the kept part of the band.
  void weigh_band(const Border& border, int bars_above) {
    int64_t ties = border.ties, i = 0;
    const Vec bar = Vec::set(border.value);
    for (int64_t block = 0; block < num_blocks(); ++block) {
      scratch.ties[block] = ties;
      Vec sum = Vec::zero();
      for (; i < scratch.ends[block]; i += Vec::N) {
        const int64_t left = scratch.ends[block] - i;
        const Vec v = Vec::load_n(scratch.band + i, left < Vec::N ? static_cast<int>(left) : Vec::N, -kInf);
        sum = add_if(kept_lanes<true>(v, bar, ties), sum, exp2((v - Vec::set(ref)) * Vec::set(scale)));
      }
      i = scratch.ends[block];
      scratch.masses[block] = sum.sum() + (bars_above > 0 ? scratch.above[block * kBars + bars_above - 1] : 0.0);
    }
    weighed = true;
  }

  // A top_k too large for candidates, and top_p within it.
  Border top_k_border() {
    int64_t n = collect(-kInf, kInf);
    Border border;
    if (s.top_k < n) {
      border = find_border<false>(scratch.band, scratch.work, n, 0.0, s.top_k, ref, scale);
      n = collect(border.value, kInf);
      for (int64_t i = 0; i < border.ties; ++i) scratch.band[n++] = border.value;
    }
    if (s.top_p >= 1.0f) return border;
    double mass = 0;
    for (int64_t i = 0; i < n; ++i) mass += weight(scratch.band[i]);
    return find_border<true>(scratch.band, scratch.work, n, 0.0, static_cast<double>(s.top_p) * mass, ref, scale);
  }

  float least_allowed_by_min_p() const {
    const double bound = sums.top + static_cast<double>(s.temperature) * std::log(static_cast<double>(s.min_p));
    const float least = static_cast<float>(bound);
    return static_cast<double>(least) < bound ? std::nextafter(least, kInf) : least;
  }

  // Lanes above the border's value, and of those equal to it the first `ties`, which counts down.
  template <bool Ties>
  static inline Mask kept_lanes(Vec v, Vec value, int64_t& ties) {
    const Mask above = v > value;
    if constexpr (!Ties) return above;
    uint32_t equal = (v >= value).bits() & ~above.bits();
    if (!equal) return above;
    uint32_t kept = above.bits();
    for (; equal && ties > 0; equal &= equal - 1, --ties) kept |= equal & (0u - equal);
    return mask_from_bits(kept);
  }

  template <bool Ties, typename Use>
  void kept_weights(int64_t block, float value, int64_t& ties, const Use& use) const {
    const Vec base = Vec::set(ref), factor = Vec::set(scale), bar = Vec::set(value);
    const int64_t begin = block * kBlock, end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    row.each(begin, end, [&](Vec v, int64_t i) __attribute__((always_inline)) {
      use(kept_lanes<Ties>(v, bar, ties), exp2((v - base) * factor), i - begin);
    });
  }

  template <bool Ties>
  void weigh(const Border& border) {
    int64_t ties = border.ties;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      scratch.ties[block] = ties;
      Vec sum = Vec::zero();
      kept_weights<Ties>(block, border.value, ties, [&](Mask kept, Vec w, int64_t) __attribute__((always_inline)) {
        sum = add_if(kept, sum, w);
      });
      scratch.masses[block] = sum.sum();
    }
  }

  // The first token at which the kept weights, added up in token order, exceed `uniform` of their sum.
  template <bool Ties>
  int64_t draw(const Border& border, double uniform) {
    if (!weighed) weigh<Ties>(border);
    double total = 0;
    for (int64_t block = 0; block < num_blocks(); ++block) total += scratch.masses[block];
    const double target = uniform * total;
    double cum = 0;
    int64_t block = 0, last = 0;
    for (; block < num_blocks(); ++block) {
      if (scratch.masses[block] > 0) last = block;
      if (cum + scratch.masses[block] > target) break;
      cum += scratch.masses[block];
    }
    if (block == num_blocks()) block = last;  // uniform < 1, but the product may round up to the total
    float weights[kBlock + Vec::N];
    int64_t ties = Ties ? scratch.ties[block] : 0;
    kept_weights<Ties>(block, border.value, ties, [&](Mask kept, Vec w, int64_t i) {
      select(kept, w, Vec::zero()).store(weights + i);
    });
    int64_t drawn = -1;
    for (int64_t i = 0; i < kBlock && block * kBlock + i < row.vocab; ++i) {
      if (!(weights[i] > 0)) continue;
      drawn = block * kBlock + i;
      cum += weights[i];
      if (cum > target) break;
    }
    return drawn;
  }

  int64_t first_of(float value) const {
    for (int64_t begin = 0; begin < row.vocab; begin += Vec::N) {
      const int64_t left = row.vocab - begin;
      const Vec v = row.allowed(Vec::load_n(row.x + begin, left < Vec::N ? static_cast<int>(left) : Vec::N, -kInf), begin);
      const uint32_t lanes = (v >= Vec::set(value)).bits();
      if (lanes) return begin + __builtin_ctz(lanes);
    }
    return -1;
  }

  int64_t draw_from_candidates(double uniform) {
    uint64_t* keys = candidates.keys;
    if (candidates.n > s.top_k) candidates.compact();
    int64_t n = candidates.n;
    sort_descending(keys, n);
    const auto weight_above = [&](float x) { return std::exp((static_cast<double>(x) - sums.top) * inv_temperature); };
    double mass = 0, kept = 0;
    for (int64_t i = 0; i < n; ++i) mass += weight_above(key_value(keys[i]));
    const double target = s.top_p < 1.0f ? s.top_p * mass : std::numeric_limits<double>::infinity();
    const float least = s.min_p > 0 ? least_allowed_by_min_p() : -kInf;
    int64_t count = 0;
    for (; count < n; ++count) {
      const float x = key_value(keys[count]);
      if (count > 0 && (kept >= target || x < least)) break;
      kept += weight_above(x);
    }
    // Back into token order: the token in the upper half of the key, and the logit below.
    for (int64_t i = 0; i < count; ++i) keys[i] = (keys[i] << 32) | (keys[i] >> 32);
    sort_descending(keys, count);  // upper half: 2^32 - 1 - token
    double cum = 0;
    int64_t drawn = 0;
    for (int64_t i = 0; i < count; ++i) {
      drawn = 0xffffffff - static_cast<int64_t>(keys[i] >> 32);
      cum += weight_above(from_ordered_bits(static_cast<uint32_t>(keys[i])));
      if (cum > uniform * kept) break;
    }
    return drawn;
  }

  SampleStatus run(int64_t& token, float& logprob, float& entropy) {
    const Probe probe(row);
    ref = probe.top > -kInf && probe.top < kInf ? probe.top : 0.0f;
    const bool greedy = s.temperature == 0.0f || s.top_k == 1;
    if (greedy) s.temperature = 1.0f;
    if (s.top_k >= row.vocab) s.top_k = 0;
    inv_temperature = 1.0f / s.temperature;
    scale = kLog2E * inv_temperature;
    const bool few = !greedy && s.top_k > 0 && s.top_k <= kMaxCandidates;
    const bool nucleus = !greedy && s.top_k == 0 && s.top_p < 1.0f;
    float bars[kBars] = {};
    if (nucleus) {
      probe.bars(1.0 - s.top_p, inv_temperature, bars);
      read<Collect::kBars>(bars);
    } else if (few) {
      read<Collect::kCandidates>(bars);
    } else {
      read<Collect::kNothing>(bars);
    }
    if (!(sums.sum < std::numeric_limits<double>::infinity()) || !(sums.top < kInf)) return kNotFinite;
    if (sums.top == -kInf) return kNoToken;

    if (greedy) {
      token = first_of(sums.top);
    } else if (few) {
      token = draw_from_candidates(uniform(s.seed, s.position));
    } else {
      Border border;
      weighed = s.top_k == 0 && !nucleus && s.min_p == 0;
      if (nucleus) border = top_p_border(bars);
      if (s.top_k > 0) border = top_k_border();
      if (s.min_p > 0) {
        const float least = least_allowed_by_min_p();
        if (least > border.value) {
          border = {std::nextafter(least, -kInf), 0};
          weighed = false;
        }
      }
      const double u = uniform(s.seed, s.position);
      token = border.value > -kInf && border.ties > 0 ? draw<true>(border, u) : draw<false>(border, u);
    }
    const double log_sum = std::log(sums.sum);
    const double drawn = to_float(row.x[token]);
    const double nats = log_sum - sums.log_sum / sums.sum * kLn2;
    logprob = static_cast<float>(drawn - ref - log_sum);
    entropy = nats > 0 ? static_cast<float>(nats) : 0.0f;
    return kSampled;
  }
};

template <typename T, bool Masked>
void sample_rows(const SampleParams& p, int64_t begin, int64_t end, const SampleScratch& scratch) {
  for (int64_t r = begin; r < end; ++r) {
    const Row<T, Masked> row{static_cast<const T*>(p.logits) + r * p.logits_stride,
                             Masked ? p.token_mask + r * p.mask_stride : nullptr, p.vocab};
    RowSampler<T, Masked> sampler{row, p.settings[r], scratch, 0.0f, 0.0f, 0.0f, {}, {}};
    int64_t token = -1;
    float logprob = std::numeric_limits<float>::quiet_NaN(), entropy = logprob;
    p.status[r] = sampler.run(token, logprob, entropy);
    p.token[r] = static_cast<int32_t>(token);
    p.logprob[r] = logprob;
    p.entropy[r] = entropy;
  }
}

template <typename T>
void sample_masked(const SampleParams& p, int64_t begin, int64_t end, const SampleScratch& scratch) {
  p.token_mask ? sample_rows<T, true>(p, begin, end, scratch) : sample_rows<T, false>(p, begin, end, scratch);
}

}  // namespace

void sample(const SampleParams& p, int64_t begin, int64_t end, const SampleScratch& scratch) {
  switch (p.dtype) {
    case DType::F32: return sample_masked<float>(p, begin, end, scratch);
    case DType::BF16: return sample_masked<bf16>(p, begin, end, scratch);
    case DType::F16: return sample_masked<fp16>(p, begin, end, scratch);
  }
}

}  // namespace treedecode::cpu::TD_ISA
