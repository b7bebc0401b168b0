#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace treedecode::cpu {
namespace {

template <typename T>
void sample_row(const SampleParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const int32_t* mask = p.token_mask ? p.token_mask + row * p.mask_stride : nullptr;
  const SampleSettings& s = p.settings[row];
  struct Entry {
    float x;
    int32_t token;
  };
  std::vector<Entry> kept;
  p.token[row] = -1;
  p.logprob[row] = p.entropy[row] = std::numeric_limits<float>::quiet_NaN();
  for (int64_t v = 0; v < p.vocab; ++v) {
    if (mask && !((static_cast<uint32_t>(mask[v >> 5]) >> (v & 31)) & 1u)) continue;
    const float value = to_float(x[v]);
    if (!(value < std::numeric_limits<float>::infinity())) {
      p.status[row] = kNotFinite;
      return;
    }
    if (value > -std::numeric_limits<float>::infinity()) kept.push_back({value, static_cast<int32_t>(v)});
  }
  if (kept.empty()) {
    p.status[row] = kNoToken;
    return;
  }
  p.status[row] = kSampled;
  std::sort(kept.begin(), kept.end(), [](const Entry& a, const Entry& b) { return a.x != b.x ? a.x > b.x : a.token < b.token; });
  const double top = kept[0].x;
  double sum = 0, weighted = 0;
  for (const Entry& e : kept) {
    const double w = std::exp(e.x - top);
    sum += w;
    weighted += w * (e.x - top);
  }
  Entry drawn = kept[0];
  if (s.temperature > 0) {
    if (s.top_k > 0 && static_cast<size_t>(s.top_k) < kept.size()) kept.resize(static_cast<size_t>(s.top_k));
    double z = 0;
    for (const Entry& e : kept) z += std::exp((e.x - top) / s.temperature);
    double before = 0;
    size_t n = 0;
    for (; n < kept.size(); ++n) {
      const double w = std::exp((kept[n].x - top) / s.temperature);
      if (n > 0 && ((s.top_p < 1 && before >= s.top_p * z) || w < s.min_p)) break;
      before += w;
    }
    kept.resize(n);
    std::sort(kept.begin(), kept.end(), [](const Entry& a, const Entry& b) { return a.token < b.token; });
    const double target = uniform(s.seed, s.position) * before;
    double cum = 0;
    for (const Entry& e : kept) {
      drawn = e;
      cum += std::exp((e.x - top) / s.temperature);
      if (cum > target) break;
    }
  }
  p.token[row] = drawn.token;
  p.logprob[row] = static_cast<float>(drawn.x - top - std::log(sum));
  p.entropy[row] = static_cast<float>(std::log(sum) - weighted / sum);
}

}  // namespace

void sample(const SampleParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    switch (p.dtype) {
      case DType::F32: sample_row<float>(p, row); break;
      case DType::BF16: sample_row<bf16>(p, row); break;
      case DType::F16: sample_row<fp16>(p, row); break;
    }
  }
}

}  // namespace treedecode::cpu
