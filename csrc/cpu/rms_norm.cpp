#include "rms_norm.h"

#include "vec.h"

namespace treedecode::cpu::TD_ISA {
namespace {

template <typename T>
Vec load_some(const T* p, int64_t n) {
  return n >= Vec::N ? Vec::load(p) : Vec::load_n(p, static_cast<int>(n));
}

template <typename T>
void store_some(T* p, Vec v, int64_t n) {
  if (n >= Vec::N) v.store(p);
  else v.store_n(p, static_cast<int>(n));
}

template <typename T>
Vec rounded(Vec v) {
  alignas(64) T lanes[Vec::N];
  v.store(lanes);
  return Vec::load(lanes);
}

template <typename T>
void run(const RmsNormParams& p, int64_t row_begin, int64_t row_end) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride.token + head * p.x_stride.head;
      T* out = static_cast<T*>(p.out) + (row * p.num_heads + head) * p.size;
      Vec squares = Vec::zero();
      for (int64_t i = 0; i < p.size; i += Vec::N) {
        const Vec v = load_some(x + i, p.size - i);
        squares = fma(v, v, squares);
      }
      const Vec scale = Vec::set(1.0f / std::sqrt(squares.sum() / static_cast<float>(p.size) + p.eps));
      for (int64_t i = 0; i < p.size; i += Vec::N) {
        const int64_t n = p.size - i;
        const Vec v = load_some(x + i, n) * scale;
        const Vec w = load_some(weight + i, n);
        store_some(out + i, p.unit_offset ? v * (w + Vec::set(1.0f)) : rounded<T>(v) * w, n);
      }
    }
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case DType::F32: return run<float>(p, row_begin, row_end);
    case DType::BF16: return run<bf16>(p, row_begin, row_end);
    case DType::F16: return run<fp16>(p, row_begin, row_end);
  }
}

}  // namespace treedecode::cpu::TD_ISA
