#include "rotary_embed.h"

#include "vec.h"

namespace treedecode::cpu::TD_ISA {
namespace {

template <typename T>
void rotate(T* x, const T* cos, const T* sin, int64_t half) {
  int64_t i = 0;
  for (; i + Vec::N <= half; i += Vec::N) {
    const Vec a = Vec::load(x + i), b = Vec::load(x + half + i);
    (a * Vec::load(cos + i) - b * Vec::load(sin + i)).store(x + i);
    (b * Vec::load(cos + half + i) + a * Vec::load(sin + half + i)).store(x + half + i);
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]);
    x[i] = from_float<T>(a * to_float(cos[i]) - b * to_float(sin[i]));
    x[half + i] = from_float<T>(b * to_float(cos[half + i]) + a * to_float(sin[half + i]));
  }
}

template <typename T>
void run(const RotaryEmbedParams& p, int64_t token_begin, int64_t token_end) {
  for (int64_t t = token_begin; t < token_end; ++t) {
    const T* cos = static_cast<const T*>(p.cos) + t * p.cos_stride;
    const T* sin = static_cast<const T*>(p.sin) + t * p.sin_stride;
    T* q = static_cast<T*>(p.q) + t * p.q_stride.token;
    T* k = static_cast<T*>(p.k) + t * p.k_stride.token;
    for (int64_t h = 0; h < p.num_qo_heads; ++h) rotate(q + h * p.q_stride.head, cos, sin, p.head_dim / 2);
    for (int64_t h = 0; h < p.num_kv_heads; ++h) rotate(k + h * p.k_stride.head, cos, sin, p.head_dim / 2);
  }
}

}  // namespace

void rotary_embed(const RotaryEmbedParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case DType::F32: return run<float>(p, token_begin, token_end);
    case DType::BF16: return run<bf16>(p, token_begin, token_end);
    case DType::F16: return run<fp16>(p, token_begin, token_end);
  }
}

}  // namespace treedecode::cpu::TD_ISA
