// sample: per-row temperature, top-k, top-p, min-p and a counter-based draw.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"

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

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
static inline void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c0;
    const uint64_t b = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// Uniform in [0, 1) with 53 bits: a function of (seed, position) alone.
static inline double uniform(uint64_t seed, uint64_t position) {
  const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t r[4];
  philox4x32(counter, key, r);
  const uint64_t bits = (static_cast<uint64_t>(r[1]) << 32) | r[0];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// Buffers of one worker.
struct SampleScratch {
  float* band;      // [vocab + 64] logits around a filter's border
  float* work;      // [vocab + 64]
  double* masses;   // [num_blocks] what each block of kBlock tokens keeps
  double* above;    // [num_blocks, kBars] mass above each bar
  int64_t* ends;    // [num_blocks] where each block's part of the band ends
  int64_t* ties;    // [num_blocks] how many tokens at the border's value may still be kept where the block begins
  uint64_t* keys;   // [kKeys]
  uint64_t* seeds;  // [kSeeds]
  static constexpr int64_t kKeys = 2 * 1024 + 128, kSeeds = 2048, kBlock = 2048;
  static constexpr int kBars = 2;
};

}  // namespace treedecode::cpu

TD_DECLARE_KERNEL(sample,
                  void sample(const SampleParams& p, int64_t row_begin, int64_t row_end, const SampleScratch& scratch))
