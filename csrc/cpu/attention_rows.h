// The state of one query row of attention: loaded from its part, stored to it, merged with others, turned into a
// result.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "tree_attention.h"
#include "vec.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;
// 2^n of a whole n <= 0, and 0 below the smallest float.
float power_of_two(float n) { return n < -149.0f ? 0.0f : __builtin_ldexpf(1.0f, static_cast<int>(n)); }

// Adds up the lanes in the same order for every instruction set.
float sum_of(const float* lanes /* [kSumLanes] */) {
  float sum = 0;
  for (int64_t j = 0; j < kSumLanes; ++j) sum += lanes[j];
  return sum;
}

template <typename T>
void write_row(const float* acc, int64_t head_dim, float factor, T* out) {
  const Vec f = Vec::set(factor);
  int64_t d = 0;
  for (; d + Vec::N <= head_dim; d += Vec::N) (Vec::load(acc + d) * f).store(out + d);
  if (d < head_dim)
    (Vec::load_n(acc + d, static_cast<int>(head_dim - d)) * f).store_n(out + d, static_cast<int>(head_dim - d));
}

// Adds the logit of the head's sink to the denominator: returns the new lse, and the factor of `out`.
struct WithSink {
  double lse, factor;
};
WithSink add_sink(const TreeAttentionParams& p, int64_t head, double lse) {
  if (!p.sinks) return {lse, 1.0};
  const double sink = p.sinks[head];
  const double m = lse > sink ? lse : sink;
  if (std::isinf(m) && m < 0) return {lse, 1.0};
  const double lse_with_sink = m + std::log(std::exp(lse - m) + std::exp(sink - m));
  return {lse_with_sink, std::exp(lse - lse_with_sink)};
}

template <typename T>
void write_empty(const TreeAttentionParams& p, int64_t token, int64_t head) {
  const int64_t row = token * p.num_qo_heads + head;
  if (p.lse) p.lse[row] = static_cast<float>(add_sink(p, head, -std::numeric_limits<double>::infinity()).lse);
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(0.0f);
}

// Writes the result of a query from its state after all of its keys; `l` is the sum of the lanes of l_i.
template <typename T>
void write_result(const TreeAttentionParams& p, int64_t token, int64_t head, const float* acc, float m_i, double l) {
  const int64_t row = token * p.num_qo_heads + head;
  const bool needs_lse = p.lse || p.sinks;
  const WithSink sink = needs_lse ? add_sink(p, head, m_i * kLn2 + std::log(l)) : WithSink{0.0, 1.0};
  if (p.lse) p.lse[row] = static_cast<float>(sink.lse);
  write_row(acc, p.head_dim, static_cast<float>(sink.factor / l), static_cast<T*>(p.out) + row * p.head_dim);
}

// Ends a row of a chunk: stores its state in its part, or its result if it has one part and this was its last chunk.
template <typename T>
void finish_row(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t token, int64_t b, int64_t head,
                const float* acc, float m_i, const float* l_i /* [kSumLanes] */) {
  const float l = sum_of(l_i);
  const bool empty = l == 0.0f;  // no key seen, acc was never written (NaN is not 0)
  const int64_t parts = num_parts(p, b);
  const int64_t segment_end = (static_cast<int64_t>(chunk.segment) + 1) * kSegment;
  const bool ends = chunk.token_end >= p.seq_lens[b] || chunk.token_end >= segment_end;
  if (parts > 1 || !ends) {
    const Part part = part_at(p, p.part_indptr[b] + (token - p.q_indptr[b]) * parts + chunk.segment, head);
    *part.m_i = m_i;
    std::memcpy(part.l_i, l_i, kSumLanes * sizeof(float));
    if (!empty) std::memcpy(part.acc, acc, static_cast<size_t>(p.head_dim) * sizeof(float));
  } else if (empty) {
    write_empty<T>(p, token, head);
  } else {
    write_result<T>(p, token, head, acc, m_i, l);
  }
}

// Begins a row of a chunk: with the state that the chunk before stored in its part, or with an empty one.
void start_row(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t token, int64_t b, int64_t head,
               float* acc, int64_t acc_stride, float& m_i, float* l_i /* [kSumLanes] */) {
  if (chunk.round == 0) {
    m_i = -kInf;
    std::memset(l_i, 0, kSumLanes * sizeof(float));
    return;
  }
  const Part part = part_at(p, p.part_indptr[b] + (token - p.q_indptr[b]) * num_parts(p, b) + chunk.segment, head);
  m_i = *part.m_i;
  std::memcpy(l_i, part.l_i, kSumLanes * sizeof(float));
  const bool empty = sum_of(l_i) == 0.0f;
  if (!empty) std::memcpy(acc, part.acc, static_cast<size_t>(p.head_dim) * sizeof(float));
  const int64_t written = empty ? 0 : p.head_dim;
  std::memset(acc + written, 0, static_cast<size_t>(acc_stride - written) * sizeof(float));
}

// Merges the parts of a query token in the order of its segments. Factors are powers of two, so only sums are rounded.
template <typename T>
void merge_token(const TreeAttentionParams& p, int64_t token, int64_t first_part, int64_t parts) {
  for (int64_t head = 0; head < p.num_qo_heads; ++head) {
    float m = -kInf;
    for (int64_t i = 0; i < parts; ++i) {
      const float m_i = *part_at(p, first_part + i, head).m_i;
      if (m_i > m) m = m_i;
    }
    if (m == -kInf) m = 0.0f;  // no key, or NaN for scores
    float acc[(kMaxHeadDim + Vec::N - 1) / Vec::N * Vec::N] = {};
    double l = 0.0;
    for (int64_t i = 0; i < parts; ++i) {
      const Part part = part_at(p, first_part + i, head);
      const float part_l = sum_of(part.l_i);
      if (part_l == 0.0f) continue;
      const float alpha = power_of_two(*part.m_i - m);
      l += static_cast<double>(part_l) * alpha;
      for (int64_t d = 0; d < p.head_dim; d += Vec::N) {
        const int n = p.head_dim - d < Vec::N ? static_cast<int>(p.head_dim - d) : Vec::N;
        fma(Vec::load_n(part.acc + d, n), Vec::set(alpha), Vec::load(acc + d)).store(acc + d);
      }
    }
    l == 0.0 ? write_empty<T>(p, token, head) : write_result<T>(p, token, head, acc, m, l);
  }
}

}  // namespace
}  // namespace treedecode::cpu::TD_ISA
