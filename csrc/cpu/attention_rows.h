// What one query row of attention begins with, leaves behind and comes to: parts of it, their merge and the result.
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
// 2^n of a whole n <= 0.
float power_of_two(float n) { return n < -149.0f ? 0.0f : __builtin_ldexpf(1.0f, static_cast<int>(n)); }

// A fixed order of the lanes, for every instruction set.
float sum_of(const float* lanes /* [kSumLanes] */) {
  float sum = 0;
  for (int64_t j = 0; j < kSumLanes; ++j) sum += lanes[j];
  return sum;
}

template <typename T>
void write_row(const float* o, int64_t head_dim, float factor, T* out) {
  const Vec f = Vec::set(factor);
  int64_t d = 0;
  for (; d + Vec::N <= head_dim; d += Vec::N) (Vec::load(o + d) * f).store(out + d);
  if (d < head_dim)
    (Vec::load_n(o + d, static_cast<int>(head_dim - d)) * f).store_n(out + d, static_cast<int>(head_dim - d));
}

// The denominator's sink: (lse, factor of out) with the sink's logit in it.
struct WithSink {
  double lse, factor;
};
WithSink add_sink(const TreeAttentionParams& p, int64_t head, double lse) {
  if (!p.sinks) return {lse, 1.0};
  const double sink = p.sinks[head];
  const double high = lse > sink ? lse : sink;
  if (std::isinf(high) && high < 0) return {lse, 1.0};
  const double with = high + std::log(std::exp(lse - high) + std::exp(sink - high));
  return {with, std::exp(lse - with)};
}

template <typename T>
void write_empty(const TreeAttentionParams& p, int64_t token, int64_t head) {
  const int64_t at = token * p.num_qo_heads + head;
  p.lse[at] = static_cast<float>(add_sink(p, head, -std::numeric_limits<double>::infinity()).lse);
  T* out = static_cast<T*>(p.out) + at * p.head_dim;
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(0.0f);
}

// Sums over all of a query's keys become its result.
template <typename T>
void write_result(const TreeAttentionParams& p, int64_t token, int64_t head, const float* o, float max, double sum) {
  const int64_t at = token * p.num_qo_heads + head;
  const WithSink sink = add_sink(p, head, max * kLn2 + std::log(sum));
  p.lse[at] = static_cast<float>(sink.lse);
  write_row(o, p.head_dim, static_cast<float>(sink.factor / sum), static_cast<T*>(p.out) + at * p.head_dim);
}

template <typename T>
void finish_row(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t token, int64_t b, int64_t head,
                const float* o, float max, const float* sums) {
  const float sum = sum_of(sums);
  const bool empty = sum == 0.0f;  // no key seen, o was never written (NaN is not 0)
  const int64_t parts = num_parts(p, b);
  const int64_t segment_end = (static_cast<int64_t>(chunk.segment) + 1) * kSegment;
  const bool ends = chunk.token_end >= p.seq_lens[b] || chunk.token_end >= segment_end;
  if (parts > 1 || !ends) {
    const Part part = part_at(p, p.part_indptr[b] + (token - p.q_indptr[b]) * parts + chunk.segment, head);
    *part.max = max;
    std::memcpy(part.sum, sums, kSumLanes * sizeof(float));
    if (!empty) std::memcpy(part.out, o, static_cast<size_t>(p.head_dim) * sizeof(float));
  } else if (empty) {
    write_empty<T>(p, token, head);
  } else {
    write_result<T>(p, token, head, o, max, sum);
  }
}

// Starts a row: with what the chunk before left in its part, or with nothing.
void start_row(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t token, int64_t b, int64_t head,
               float* o, int64_t o_stride, float& max, float* sums) {
  if (chunk.round == 0) {
    max = -kInf;
    std::memset(sums, 0, kSumLanes * sizeof(float));
    return;
  }
  const Part part = part_at(p, p.part_indptr[b] + (token - p.q_indptr[b]) * num_parts(p, b) + chunk.segment, head);
  max = *part.max;
  std::memcpy(sums, part.sum, kSumLanes * sizeof(float));
  const bool empty = sum_of(sums) == 0.0f;
  if (!empty) std::memcpy(o, part.out, static_cast<size_t>(p.head_dim) * sizeof(float));
  const int64_t written = empty ? 0 : p.head_dim;
  std::memset(o + written, 0, static_cast<size_t>(o_stride - written) * sizeof(float));
}

// Adds up the segments of a query token in order. Factors are powers of two, so only the sums are rounded.
template <typename T>
void merge_token(const TreeAttentionParams& p, int64_t token, int64_t first_part, int64_t parts) {
  for (int64_t head = 0; head < p.num_qo_heads; ++head) {
    float high = -kInf;
    for (int64_t i = 0; i < parts; ++i) {
      const float max = *part_at(p, first_part + i, head).max;
      if (max > high) high = max;
    }
    if (high == -kInf) high = 0.0f;  // no key, or NaN for scores
    float o[(kMaxHeadDim + Vec::N - 1) / Vec::N * Vec::N] = {};
    double total = 0.0;
    for (int64_t i = 0; i < parts; ++i) {
      const Part part = part_at(p, first_part + i, head);
      const float sum = sum_of(part.sum);
      if (sum == 0.0f) continue;
      const float weight = power_of_two(*part.max - high);
      total += static_cast<double>(sum) * weight;
      for (int64_t d = 0; d < p.head_dim; d += Vec::N) {
        const int n = p.head_dim - d < Vec::N ? static_cast<int>(p.head_dim - d) : Vec::N;
        fma(Vec::load_n(part.out + d, n), Vec::set(weight), Vec::load(o + d)).store(o + d);
      }
    }
    total == 0.0 ? write_empty<T>(p, token, head) : write_result<T>(p, token, head, o, high, total);
  }
}

}  // namespace
}  // namespace treedecode::cpu::TD_ISA
