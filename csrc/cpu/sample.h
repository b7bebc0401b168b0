// sample: per-row temperature, top-k, top-p, min-p and a counter-based draw.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "philox.h"

namespace treedecode::cpu {

struct SampleSettings {
  float temperature;  // 0 = argmax
  float top_p;        // 1 = off
  float min_p;        // 0 = off
  int32_t top_k;      // 0 = off
  uint64_t seed;
  uint64_t position;
};

enum SampleStatus : int32_t { kSampled = 0, kNotFinite = 1, kNoToken = 2 };

struct SampleParams {
  const void* logits;              // [rows, vocab], unit stride along vocab
  const int32_t* token_mask;       // [rows, ceil(vocab / 32)] bit set = allowed, or nullptr
  const SampleSettings* settings;  // [rows]
  int32_t* token;                  // [rows] out
  float* logprob;                  // [rows] out
  float* entropy;                  // [rows] out
  int32_t* status;                 // [rows] out, SampleStatus
  int64_t rows;
  int64_t vocab;
  int64_t logits_stride;  // between rows, in elements
  int64_t mask_stride;    // between rows, in words
  DType dtype;
};

// Buffers of one worker.
struct SampleScratch {
  float* band;      // [vocab + 64] logits around a filter's border
  float* work;      // [vocab + 64]
  double* masses;   // [num_blocks] of the tokens that each block of kBlock tokens keeps
  double* above;    // [num_blocks, kThresholds] mass above each threshold
  int64_t* ends;    // [num_blocks] where each block's part of the band ends
  int64_t* ties;    // [num_blocks] how many tokens at the border's value may still be kept where the block begins
  uint64_t* keys;   // [kKeys]
  uint64_t* seeds;  // [kSeeds]
  static constexpr int64_t kKeys = 2 * 1024 + 128, kSeeds = 2048, kBlock = 2048;
  static constexpr int kThresholds = 2;
};

}  // namespace treedecode::cpu

TD_DECLARE_KERNEL(sample,
                  void sample(const SampleParams& p, int64_t row_begin, int64_t row_end, const SampleScratch& scratch))
