#include <cmath>
#include <limits>

#include "beam_prune.h"
#include "select.h"

namespace treedecode::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Returns the log-sum-exp of a row, NaN when one of its chunks holds a bad logit.
double row_lse(const BeamPruneParams& p, int64_t row) {
  const int64_t item = row * p.num_chunks;
  float row_ref = -kInf;
  for (int64_t c = 0; c < p.num_chunks; ++c) {
    if (p.chunk_counts[item + c] < 0) return std::numeric_limits<double>::quiet_NaN();
    row_ref = p.chunk_refs[item + c] > row_ref ? p.chunk_refs[item + c] : row_ref;
  }
  if (p.is_logprobs) return 0.0;
  if (row_ref == -kInf) return -kInf;
  double sum = 0.0;
  for (int64_t c = 0; c < p.num_chunks; ++c) {
    if (p.chunk_refs[item + c] == -kInf) continue;
    sum += p.chunk_sums[item + c] * std::exp(static_cast<double>(p.chunk_refs[item + c]) - row_ref);
  }
  return row_ref + std::log(sum);
}

void rank_row(const BeamPruneParams& p, int64_t row, int64_t rank_base) {
  const double lse = row_lse(p, row);
  p.lse[row] = static_cast<float>(lse);
  p.row_counts[row] = 0;
  if (std::isnan(lse)) return;
  // Compact the chunks' keys to the front of the row's first chunk; a chunk's keys never move up.
  uint64_t* keys = p.chunk_keys + row * p.num_chunks * p.row_k;
  int64_t n = 0;
  for (int64_t c = 0; c < p.num_chunks; ++c) {
    const uint64_t* from = p.chunk_keys + (row * p.num_chunks + c) * p.row_k;
    for (int64_t j = 0; j < p.chunk_counts[row * p.num_chunks + c]; ++j) keys[n++] = from[j];
  }
  if (n > p.row_k) {
    keep_largest(keys, n, p.row_k);
    n = p.row_k;
  }
  sort_descending(keys, n);
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double logprob = static_cast<double>(key_value(keys[j])) - lse;
    const float score = static_cast<float>(static_cast<double>(p.cum_logprobs[row]) + logprob);
    if (!(score > -kInf)) break;
    p.row_keys[row * p.row_k + count] = make_key(score, static_cast<uint32_t>(rank_base + count));
    p.row_tokens[row * p.row_k + count] = static_cast<int32_t>(key_index(keys[j]));
    ++count;
  }
  p.row_counts[row] = count;
}

}  // namespace

void beam_prune_rank(const BeamPruneParams& p, int64_t row_begin, int64_t row_end) {
  int64_t group = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    while (group < p.num_groups && p.group_indptr[group + 1] <= row) ++group;
    rank_row(p, row, group < p.num_groups ? (row - p.group_indptr[group]) * p.row_k : 0);
  }
}

void beam_prune_merge(const BeamPruneParams& p, int64_t group_begin, int64_t group_end, uint64_t* keys) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t first = p.group_indptr[g];
    int64_t n = 0;
    for (int64_t row = first; row < p.group_indptr[g + 1]; ++row) {
      for (int64_t j = 0; j < p.row_counts[row]; ++j) keys[n++] = p.row_keys[row * p.row_k + j];
    }
    if (n > p.k) {
      keep_largest(keys, n, p.k);
      n = p.k;
    }
    sort_descending(keys, n);
    for (int64_t j = 0; j < p.k; ++j) {
      const int64_t out = g * p.k + j;
      const int64_t rank = j < n ? key_index(keys[j]) : 0;
      p.scores[out] = j < n ? key_value(keys[j]) : -kInf;
      p.parent[out] = j < n ? static_cast<int32_t>(first + rank / p.row_k) : -1;
      p.token[out] = j < n ? p.row_tokens[first * p.row_k + rank] : -1;
    }
  }
}

}  // namespace treedecode::cpu
