#include "sample.h"

#include <cmath>
#include <limits>

#include "sample_pass.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309417;
constexpr int64_t kMaxCandidates = 1024;  // up to this top_k, the first pass collects the candidates

template <typename T, bool Masked>
struct RowSampler {
  Row<T, Masked> row;
  SampleSettings s;
  SampleScratch scratch;
  float ref;  // base of the exponentials: at most the row's maximum, and not far below it
  float inv_temperature;
  float scale;  // log2(e) / temperature
  Sums sums;
  Candidates candidates;
  bool has_masses = false;  // scratch.masses (and ties) are those of the kept tokens

  int64_t num_blocks() const { return (row.vocab + kBlock - 1) / kBlock; }
  bool tempered() const { return s.temperature != 1.0f; }

  template <Collect C>
  Sums pass(const float* thresholds) {
    if (C == Collect::kCandidates) candidates = Candidates{scratch.keys, scratch.seeds, s.top_k};
    // The masses of candidates are computed later, for them alone.
    return tempered() && C != Collect::kCandidates
               ? sum_row<C, true>(row, ref, inv_temperature, thresholds, scratch, &candidates)
               : sum_row<C, false>(row, ref, 1.0f, thresholds, scratch, &candidates);
  }

  template <Collect C>
  void read(const float* thresholds) {
    sums = pass<C>(thresholds);
    const bool usable = sums.sum < 0x1p40 && sums.mass < 0x1p40 && sums.sum >= 0.5;
    if (usable || !(sums.max < kInf) || sums.max == -kInf) return;
    ref = sums.max;  // the probe missed tokens far above all others
    sums = pass<C>(thresholds);
  }

  // Reads the row and splits it at two thresholds. If the probe is not representative, the split needs a second pass,
  // which finds the row in the cache.
  void read_and_split(const Probe& probe, float thresholds[kThresholds]) {
    const float tail = 1.0f - s.top_p;
    Probe::Masses masses;
    probe.fill(scale, masses);
    if (masses.is_representative) {
      probe.thresholds(masses, tail * masses.total, scale, thresholds);
      read<Collect::kBand>(thresholds);
      return;
    }
    read<Collect::kNothing>(thresholds);
    if (!(sums.max < kInf) || sums.max == -kInf) return;
    // The row's mass, relative to the probe's maximum and scaled to the number of the probe's tokens.
    const double total = sums.mass * std::exp(static_cast<double>(ref - probe.max_logit) * scale * kLn2) *
                         static_cast<double>(probe.n) / static_cast<double>(row.vocab);
    probe.thresholds(masses, tail * static_cast<float>(total), scale, thresholds);
    split_row(row, ref, scale, thresholds, scratch, sums);
  }

  double weight(float x) const { return std::exp(static_cast<double>(x - ref) * scale * kLn2); }

  // Stores all logits in (lo, hi] in the band, in token order. Returns how many there are.
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

  Border top_p_border(const float* thresholds) {
    // A positive target, so that at least the best token is kept.
    const double wanted = static_cast<double>(s.top_p) * sums.mass, smallest = std::numeric_limits<double>::min();
    const double target = wanted > smallest ? wanted : smallest;
    int i = 0;  // the border is between thresholds i - 1 and i
    while (i < kThresholds && sums.above[i] < target) ++i;
    const int64_t n = i == 1 ? sums.num_in_band  // as a rule: the probe's guess was right
                             : collect(i < kThresholds ? thresholds[i] : -kInf, i > 0 ? thresholds[i - 1] : kInf);
    if (n == 0) return {};  // below the lower threshold: top_p is so near 1 that, rounded, all tokens are kept
    const double above = i > 0 ? sums.above[i - 1] : 0.0;
    const Border border = find_border<true>(scratch.band, scratch.work, n, above, target, ref, scale);
    sum_masses_of_band(border, i);
    return border;
  }

  // Adds up the masses that each block keeps: those above the band, which the first pass has, and the kept part of the
  // band.
  void sum_masses_of_band(const Border& border, int thresholds_above) {
    int64_t ties = border.ties, i = 0;
    const Vec value = Vec::set(border.value);
    for (int64_t block = 0; block < num_blocks(); ++block) {
      scratch.ties[block] = ties;
      Vec sum = Vec::zero();
      for (; i < scratch.ends[block]; i += Vec::N) {
        const int64_t remaining = scratch.ends[block] - i;
        const Vec v = Vec::load_n(scratch.band + i, remaining < Vec::N ? static_cast<int>(remaining) : Vec::N, -kInf);
        sum = add_if(kept_lanes<true>(v, value, ties), sum, exp2((v - Vec::set(ref)) * Vec::set(scale)));
      }
      i = scratch.ends[block];
      scratch.masses[block] =
          sum.sum() + (thresholds_above > 0 ? scratch.above[block * kThresholds + thresholds_above - 1] : 0.0);
    }
    has_masses = true;
  }

  // The border of a top_k that is too large for candidates, and of top_p within it.
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

  // Returns the smallest logit that min_p keeps: the smallest fp32 number that reaches the exact bound.
  float min_p_threshold() const {
    const double bound = sums.max + static_cast<double>(s.temperature) * std::log(static_cast<double>(s.min_p));
    const float rounded = static_cast<float>(bound);
    return static_cast<double>(rounded) < bound ? std::nextafter(rounded, kInf) : rounded;
  }

  // Returns the lanes above the border's value, and the first `ties` of those equal to it. Counts `ties` down.
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
    const Vec base = Vec::set(ref), factor = Vec::set(scale), border = Vec::set(value);
    const int64_t begin = block * kBlock, end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    row.each(begin, end, [&](Vec v, int64_t i) __attribute__((always_inline)) {
      use(kept_lanes<Ties>(v, border, ties), exp2((v - base) * factor), i - begin);
    });
  }

  // Adds up the masses that each block keeps, in another pass.
  template <bool Ties>
  void sum_masses(const Border& border) {
    int64_t ties = border.ties;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      scratch.ties[block] = ties;
      Vec sum = Vec::zero();
      kept_weights<Ties>(block, border.value, ties,
                         [&](Mask kept, Vec w, int64_t) __attribute__((always_inline)) { sum = add_if(kept, sum, w); });
      scratch.masses[block] = sum.sum();
    }
  }

  // Returns the first token at which the kept weights, added up in token order, exceed `uniform` of their sum.
  template <bool Ties>
  int64_t draw(const Border& border, double uniform) {
    if (!has_masses) sum_masses<Ties>(border);
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
    const auto weight_of = [&](float x) { return std::exp((static_cast<double>(x) - sums.max) * inv_temperature); };
    double mass = 0, kept_mass = 0;
    for (int64_t i = 0; i < n; ++i) mass += weight_of(key_value(keys[i]));
    const double target = s.top_p < 1.0f ? s.top_p * mass : std::numeric_limits<double>::infinity();
    const float min_logit = s.min_p > 0 ? min_p_threshold() : -kInf;
    int64_t count = 0;
    for (; count < n; ++count) {
      const float x = key_value(keys[count]);
      if (count > 0 && (kept_mass >= target || x < min_logit)) break;
      kept_mass += weight_of(x);
    }
    // Token order: the token is the upper half of the new key, and the logit the lower one.
    for (int64_t i = 0; i < count; ++i) keys[i] = (keys[i] << 32) | (keys[i] >> 32);
    sort_descending(keys, count);  // upper half: 2^32 - 1 - token
    double cum = 0;
    int64_t drawn = 0;
    for (int64_t i = 0; i < count; ++i) {
      drawn = 0xffffffff - static_cast<int64_t>(keys[i] >> 32);
      cum += weight_of(from_ordered_bits(static_cast<uint32_t>(keys[i])));
      if (cum > uniform * kept_mass) break;
    }
    return drawn;
  }

  SampleStatus run(int64_t& token, float& logprob, float& entropy) {
    const Probe probe(row);
    ref = probe.max_logit > -kInf && probe.max_logit < kInf ? probe.max_logit : 0.0f;
    const bool greedy = s.temperature == 0.0f || s.top_k == 1;
    if (greedy) s.temperature = 1.0f;
    if (s.top_k >= row.vocab) s.top_k = 0;
    inv_temperature = 1.0f / (s.temperature > 1e-30f ? s.temperature : 1e-30f);
    scale = kLog2E * inv_temperature;
    const bool few = !greedy && s.top_k > 0 && s.top_k <= kMaxCandidates;
    const bool nucleus = !greedy && s.top_k == 0 && s.top_p < 1.0f;
    float thresholds[kThresholds] = {};
    if (nucleus) {
      read_and_split(probe, thresholds);
    } else if (few) {
      read<Collect::kCandidates>(thresholds);
    } else {
      read<Collect::kNothing>(thresholds);
    }
    if (!(sums.sum < std::numeric_limits<double>::infinity()) || !(sums.max < kInf)) return kNotFinite;
    if (sums.max == -kInf) return kNoToken;

    if (greedy) {
      token = first_of(sums.max);
    } else if (few) {
      token = draw_from_candidates(uniform(s.seed, s.position));
    } else {
      Border border;
      has_masses = s.top_k == 0 && !nucleus && s.min_p == 0;
      if (nucleus) border = top_p_border(thresholds);
      if (s.top_k > 0) border = top_k_border();
      if (s.min_p > 0) {
        const float min_logit = min_p_threshold();
        if (min_logit > border.value) {
          border = {just_below(min_logit), 0};
          has_masses = false;
        }
      }
      const double u = uniform(s.seed, s.position);
      token = border.value > -kInf && border.ties > 0 ? draw<true>(border, u) : draw<false>(border, u);
      if (token < 0) token = first_of(sums.max);  // all weights round to 0 in this sum and not in the other one
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
