#include "sample.h"

#include <cmath>
#include <limits>

#include "sample_pass.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr int64_t kMaxCandidates = 1024;  // a top_k up to this is found on the way, in the one pass

template <typename T, bool Masked>
struct RowSampler {
  Row<T, Masked> row;
  SampleSettings s;
  SampleScratch scratch;
  float ref;  // what exponentials are relative to: at most the row's maximum, and not far below it
  float inv_temperature;
  float scale;  // log2(e) / temperature
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

  // Where the probe's total is no guide to the row's, the row is split in a second pass, which finds it in the cache.
  void read_and_split(const Probe& probe, float bars[kBars]) {
    const float tail = 1.0f - s.top_p;
    Probe::Masses masses;
    probe.weigh(scale, masses);
    if (masses.many) {
      probe.bars(masses, tail * masses.total, scale, bars);
      read<Collect::kBars>(bars);
      return;
    }
    read<Collect::kNothing>(bars);
    if (!(sums.top < kInf) || sums.top == -kInf) return;
    // The row's mass, in the probe's units and for as many tokens as it has.
    const double total = sums.mass * std::exp(static_cast<double>(ref - probe.top) * scale * kLn2) *
                         static_cast<double>(probe.n) / static_cast<double>(row.vocab);
    probe.bars(masses, tail * static_cast<float>(total), scale, bars);
    split_row(row, ref, scale, bars, scratch, sums);
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
    // The best token is always kept: a target of 0 would be reached above a bar that nothing is above.
    const double wanted = static_cast<double>(s.top_p) * sums.mass, least = std::numeric_limits<double>::min();
    const double target = wanted > least ? wanted : least;
    int bar = 0;
    while (bar < kBars && sums.above[bar] < target) ++bar;
    const int64_t n = bar == 1 ? sums.num_in_band  // as a rule: the probe's guess was right
                               : collect(bar < kBars ? bars[bar] : -kInf, bar > 0 ? bars[bar - 1] : kInf);
    if (n == 0) return {};  // below the lowest bar: top_p is so near 1 that rounding has eaten the rest
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
    const int count = __builtin_popcount(equal);
    if (count <= ties) {
      ties -= count;
      return mask_from_bits(kept | equal);
    }
    for (; ties > 0; equal &= equal - 1, --ties) kept |= equal & (0u - equal);
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
      kept_weights<Ties>(block, border.value, ties,
                         [&](Mask kept, Vec w, int64_t) __attribute__((always_inline)) { sum = add_if(kept, sum, w); });
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
    kept_weights<Ties>(block, border.value, ties,
                       [&](Mask kept, Vec w, int64_t i) { select(kept, w, Vec::zero()).store(weights + i); });
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
      const uint32_t lanes = (row.load_n(begin, row.vocab - begin) >= Vec::set(value)).bits();
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
    inv_temperature = 1.0f / (s.temperature > 1e-30f ? s.temperature : 1e-30f);
    scale = kLog2E * inv_temperature;
    const bool few = !greedy && s.top_k > 0 && s.top_k <= kMaxCandidates;
    const bool nucleus = !greedy && s.top_k == 0 && s.top_p < 1.0f;
    float bars[kBars] = {};
    if (nucleus) {
      read_and_split(probe, bars);
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
          border = {just_below(least), 0};
          weighed = false;
        }
      }
      const double u = uniform(s.seed, s.position);
      token = border.value > -kInf && border.ties > 0 ? draw<true>(border, u) : draw<false>(border, u);
      if (token < 0) token = first_of(sums.top);  // weights that round to 0 in one sum and not in the other
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
