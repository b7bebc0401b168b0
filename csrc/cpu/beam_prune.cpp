#include "beam_prune.h"

#include <cmath>
#include <limits>

#include "candidates.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename T, bool Masked>
static inline Vec candidate_values(Vec x, const int32_t* mask, int64_t i) {
  if constexpr (Masked) return select(allowed_lanes(mask, i), x, Vec::set(-kInf));
  return x;
}

template <typename T>
static inline Vec load_n(const T* x, int64_t i, int64_t end) {
  if (i >= end) return Vec::set(-kInf);
  return Vec::load_n(x + i, end - i < Vec::N ? static_cast<int>(end - i) : Vec::N, -kInf);
}

template <typename T>
float block_max(const T* x, int64_t begin, int64_t end) {
  Vec m = Vec::set(-kInf);
  int64_t i = begin;
  for (; i + Vec::N <= end; i += Vec::N) m = max(Vec::load(x + i), m);
  if (i < end) m = max(Vec::load_n(x + i, static_cast<int>(end - i), -kInf), m);
  return m.max();
}

// Sums up chunk `item` and adds its best tokens to the candidates. Returns false for a NaN or +inf among its logits.
template <typename T, bool Masked, bool WithSum>
bool scan_chunk(const BeamPruneParams& p, int64_t item, Candidates& c) {
  const int64_t row = item / p.num_chunks;
  const int64_t first = (item % p.num_chunks) * p.chunk_len;
  const int64_t last = first + p.chunk_len < p.vocab ? first + p.chunk_len : p.vocab;
  const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const int32_t* mask = Masked ? p.token_mask + row * p.mask_stride : nullptr;
  float ref = -kInf;
  double total = 0.0;
  const int64_t block_len = Candidates::block_len(p.row_k);
  for (int64_t begin = first; begin < last; begin += block_len) {
    const int64_t end = begin + block_len < last ? begin + block_len : last;
    c.begin_block(begin, end, [&](int64_t i) { return candidate_values<T, Masked>(Vec::load(x + i), mask, i); });
    if (WithSum && ref == -kInf) {
      ref = block_max(x, begin, end);
      if (!(ref < kInf)) return false;
    }
    for (int attempt = 0; attempt < 2; ++attempt) {
      const Vec base = Vec::set(ref == -kInf ? 0.0f : ref);
      Vec sums[kWide];
      for (int j = 0; j < kWide; ++j) sums[j] = Vec::zero();
      for (int64_t i = begin; i < end; i += kWide * Vec::N) {
        Vec v[kWide], t[kWide];
        if (__builtin_expect(i + kWide * Vec::N <= end, 1)) {
          load_wide(x + i, v);
        } else {
          for (int j = 0; j < kWide; ++j) v[j] = load_n(x, i + j * Vec::N, end);
        }
        if constexpr (WithSum) {
          for (int j = 0; j < kWide; ++j) t[j] = (v[j] - base) * Vec::set(kLog2E);
          add_exp2(t, sums);
        } else {
          // No exponentials are summed that would show NaN and +inf, so these become NaN in the sum; -inf is legal.
          for (int j = 0; j < kWide; ++j) sums[j] = select(v[j] < Vec::set(kInf), sums[j], v[j] - v[j]);
        }
        Vec highest = v[0];
        for (int j = 1; j < kWide; ++j) highest = max(highest, v[j]);
        if (__builtin_expect((highest > Vec::set(c.threshold)).any(), 0) && attempt == 0) {
          for (int j = 0; j < kWide && i + j * Vec::N < end; ++j) {
            const Vec allowed = candidate_values<T, Masked>(load_n(x, i + j * Vec::N, end), mask, i + j * Vec::N);
            const uint32_t lanes = (allowed > Vec::set(c.threshold)).bits();
            if (lanes) c.insert(allowed, lanes, i + j * Vec::N);
          }
        }
      }
      Vec all = sums[0];
      for (int j = 1; j < kWide; ++j) all += sums[j];
      const float sum = all.sum();
      if (sum < 0x1p60f) {
        total += sum;
        break;
      }
      // The block is far above the ones before (or has NaN): its maximum becomes the base, and it is summed again from
      // L1.
      const float new_ref = block_max(x, begin, end);
      if (!WithSum || attempt == 1 || !(new_ref < kInf) || !(new_ref > ref)) return false;
      total *= std::exp(static_cast<double>(ref) - new_ref);
      ref = new_ref;
    }
  }
  p.chunk_refs[item] = ref;
  p.chunk_sums[item] = total;
  return true;
}

template <typename T, bool Masked, bool WithSum>
void scan_chunks(const BeamPruneParams& p, int64_t begin, int64_t end, uint64_t* buffer, uint64_t* seeds) {
  Candidates candidates{buffer, seeds, p.row_k};
  for (int64_t item = begin; item < end; ++item) {
    p.chunk_counts[item] = scan_chunk<T, Masked, WithSum>(p, item, candidates) ? 0 : -1;
    // Neighbouring chunks of one row share their candidates, so that a token which is only among the best of its own
    // chunk is dropped at once.
    if (item + 1 < end && (item + 1) % p.num_chunks) continue;
    if (candidates.n > p.row_k) candidates.compact();
    uint64_t* out = p.chunk_keys + item * p.row_k;
    for (int64_t j = 0; j < candidates.n; ++j) out[j] = candidates.keys[j];
    if (p.chunk_counts[item] == 0) p.chunk_counts[item] = candidates.n;
    candidates = Candidates{buffer, seeds, p.row_k};
  }
}

template <typename T>
void scan(const BeamPruneParams& p, int64_t begin, int64_t end, uint64_t* buffer, uint64_t* seeds) {
  if (p.token_mask) {
    p.is_logprobs ? scan_chunks<T, true, false>(p, begin, end, buffer, seeds)
                  : scan_chunks<T, true, true>(p, begin, end, buffer, seeds);
  } else {
    p.is_logprobs ? scan_chunks<T, false, false>(p, begin, end, buffer, seeds)
                  : scan_chunks<T, false, true>(p, begin, end, buffer, seeds);
  }
}

}  // namespace

void beam_prune_scan(const BeamPruneParams& p, int64_t begin, int64_t end, uint64_t* buffer, uint64_t* seeds) {
  switch (p.dtype) {
    case DType::F32: return scan<float>(p, begin, end, buffer, seeds);
    case DType::BF16: return scan<bf16>(p, begin, end, buffer, seeds);
    case DType::F16: return scan<fp16>(p, begin, end, buffer, seeds);
  }
}

}  // namespace treedecode::cpu::TD_ISA
