// sample on the device: per-row temperature, top-k, top-p, min-p and a counter-based draw.
//
// scan  a block per (row, chunk of the vocabulary): sums of exponentials, and of rows with a filter the best tokens
// draw  a block per row. Without a filter it picks a chunk by its sum and reads that one again. With a filter it
// searches
//       the chunks' best tokens, which are complete down to some rank, for the last token that is kept; only where that
//       one has a lower rank, it searches the whole row.
//
// A row with NaN or +inf, without a possible token, or with settings out of range gets token -1 and NaN.
#pragma once

#include <cstdint>

#include "../common/runtime.h"
#include "logits.h"

namespace treedecode::cuda {

// Elements between rows; 0 = one value for all rows.
struct SampleStrides {
  int64_t temperature;
  int64_t top_k;
  int64_t top_p;
  int64_t min_p;
  int64_t seed;
  int64_t position;
};

// Sums of a chunk of a row, relative to its maximum.
struct SampleChunkSums {
  float max;
  float sum;      // of exp(x - max)
  float log_sum;  // of exp(x - max) * log2(exp(x - max))
  float mass;     // of exp((x - max) / temperature)
};

struct SampleParams {
  LogitsParams logits;
  const float* temperature;     // [rows], each of these with its stride in `strides`
  const int32_t* top_k;         // [rows] 0 = off
  const float* top_p;           // [rows] 1 = off
  const float* min_p;           // [rows] 0 = off
  const int64_t* seeds;         // [rows]
  const int64_t* positions;     // [rows]
  int32_t* token;               // [rows] out
  float* logprob;               // [rows] out
  float* entropy;               // [rows] out
  SampleChunkSums* chunk_sums;  // [rows, num_chunks] scratch
  uint64_t* chunk_min_key;      // [rows, num_chunks] scratch: chunk_keys has all keys of the chunk from this one on
  uint64_t* chunk_keys;         // [rows, num_chunks, kSampleSlot] scratch: (logit, token) keys of each chunk's best
  SampleStrides strides;
};

inline constexpr int kSampleBest = 128;  // tokens of a chunk that chunk_keys has for certain
inline constexpr int kSampleSlot = 160;  // room for some more, which saves a selection of the best 128

cudaError_t sample(const SampleParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
