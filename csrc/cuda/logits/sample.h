// sample on the device: per-row temperature, top-k, top-p, min-p and a counter-based draw.
//
// scan  a block per (row, chunk of the vocabulary): sums of exponentials, and of rows with a filter the best tokens
// draw  a block per row. Without a filter it picks a chunk by its sum and reads that one again. With a filter it looks
//       for the border of what is kept among the chunks' best tokens, which are complete down to some rank; only where
//       the border lies further down it searches the row itself.
//
// A row with NaN or +inf, without a possible token, or with settings out of range gets token -1 and NaN.
#pragma once

#include <cstdint>

#include "../common/runtime.h"
#include "logits.h"

namespace treedecode::cuda {

// Distances between rows in elements; 0 = one value for all rows.
struct SampleStrides {
  int64_t temperature;
  int64_t top_k;
  int64_t top_p;
  int64_t min_p;
  int64_t seed;
  int64_t position;
};

// Of a chunk of a row, relative to its maximum.
struct SampleChunkSums {
  float top;      // the maximum
  float sum;      // of exp(x - top)
  float log_sum;  // of exp(x - top) * log2(exp(x - top))
  float mass;     // of exp((x - top) / temperature)
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
  uint64_t* chunk_least;        // [rows, num_chunks] scratch: the least key that is sure to be among chunk_keys
  uint64_t* chunk_keys;         // [rows, num_chunks, kSampleSlot] scratch: (logit, token) keys of each chunk's best
  SampleStrides strides;
};

inline constexpr int kSampleBest = 128;  // tokens of a chunk that are sure to be known
inline constexpr int kSampleSlot = 160;  // finding out which are the best 128 is saved when some more fit

cudaError_t sample(const SampleParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
