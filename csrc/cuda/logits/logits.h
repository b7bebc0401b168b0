// Logits as beam_prune and sample read them: rows in chunks, a block of threads per chunk.
#pragma once

#include <cstdint>

#include "../../cpu/dtypes.h"

namespace treedecode::cuda {

struct LogitsParams {
  const void* data;           // [rows, vocab], unit stride along vocab
  const int32_t* token_mask;  // [rows, ceil(vocab / 32)] bit set = allowed, or nullptr
  int64_t rows;
  int64_t vocab;
  int64_t stride;       // between rows, in elements
  int64_t mask_stride;  // between rows, in words
  uint32_t num_chunks;  // of a row
  uint32_t chunk_len;   // a multiple of 32: a chunk begins at a word of the mask
  DType dtype;
};

inline constexpr int kLogitsThreads = 256;
inline constexpr int kVectors = 8;  // 16-byte loads of a thread, all in flight at once

constexpr int64_t longest_chunk(DType dtype) { return kLogitsThreads * kVectors * (dtype == DType::F32 ? 4 : 8); }

// Divides rows into equal chunks, by the vocabulary and the dtype alone: a row's results do not depend on its batch.
constexpr void set_chunks(LogitsParams& p) {
  const int64_t num = (p.vocab + longest_chunk(p.dtype) - 1) / longest_chunk(p.dtype);
  const int64_t len = ((p.vocab + num - 1) / num + 31) / 32 * 32;
  p.num_chunks = static_cast<uint32_t>((p.vocab + len - 1) / len);
  p.chunk_len = static_cast<uint32_t>(len);
}

}  // namespace treedecode::cuda
