// A chunk of a row of logits in the registers of a block, read once from memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/collectives.cuh"
#include "logits.h"

namespace treedecode::cuda {

inline constexpr float kInf = INFINITY;
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr double kLn2 = 0.693147180559945309417;

template <typename T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// A word of -inf, in both halves for 16-bit types.
template <typename T>
inline constexpr uint32_t kMinusInfBits = std::is_same_v<T, float>  ? 0xff800000u
                                          : std::is_same_v<T, bf16> ? 0xff80ff80u
                                                                    : 0xfc00fc00u;

template <typename T>
__device__ __forceinline__ float element(const ptx::Bytes16& v, int e) {
  if constexpr (std::is_same_v<T, float>) return ptx::bits_float(v.word[e]);
  else return ptx::to_float(T{static_cast<uint16_t>(v.word[e / 2] >> (e % 2 * 16))});
}

// Loads elements i to i + kPerVector of a row of any alignment; -inf from vocab on. i is a multiple of kPerVector.
template <typename T>
__device__ __forceinline__ ptx::Bytes16 load_vector(const T* row, int64_t i, int64_t vocab) {
  constexpr int N = kPerVector<T>;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16);
  ptx::Bytes16 v;
  if (shift == 0 && i + N <= vocab) return ptx::load_once(reinterpret_cast<const ptx::Bytes16*>(row + i));
  if (shift != 0 && i > 0 && i + 2 * N <= vocab) {
    // The two aligned vectors that hold the elements lie within the row. Neighbour lanes read them too, from L1.
    const auto* p = reinterpret_cast<const ptx::Bytes16*>(reinterpret_cast<uintptr_t>(row + i) - shift);
    const ptx::Bytes16 low = p[0], high = p[1];
    uint32_t w[8];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      w[k] = low.word[k];
      w[k + 4] = high.word[k];
    }
    if (shift & 8) {
#pragma unroll
      for (int k = 0; k < 6; ++k) w[k] = w[k + 2];
    }
    if (shift & 4) {
#pragma unroll
      for (int k = 0; k < 5; ++k) w[k] = w[k + 1];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t both = static_cast<uint64_t>(w[k + 1]) << 32 | w[k];
      v.word[k] = static_cast<uint32_t>(both >> (shift % 4 * 8));
    }
    return v;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) v.word[k] = kMinusInfBits<T>;
  if (i >= vocab) return v;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (i + e >= vocab) continue;
    if constexpr (std::is_same_v<T, float>) {
      v.word[e] = ptx::float_bits(row[i + e]);
    } else {
      const uint32_t half = 0xffffu << (e % 2 * 16);
      v.word[e / 2] = (v.word[e / 2] & ~half) | static_cast<uint32_t>(row[i + e].bits) << (e % 2 * 16);
    }
  }
  return v;
}

// Sets elements whose bit is not set in `allowed` to -inf.
template <typename T>
__device__ __forceinline__ void forbid(ptx::Bytes16& v, uint32_t allowed) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      if (!(allowed >> k & 1)) v.word[k] = kMinusInfBits<T>;
    } else {
      const uint32_t kept = (allowed >> (2 * k) & 1 ? 0xffffu : 0u) | (allowed >> (2 * k + 1) & 1 ? 0xffff0000u : 0u);
      v.word[k] = (v.word[k] & kept) | (kMinusInfBits<T> & ~kept);
    }
  }
}

template <typename T>
struct Row {
  const T* x;           // [vocab]
  const int32_t* mask;  // [ceil(vocab / 32)] or nullptr
  int64_t vocab;

  __device__ Row(const LogitsParams& p, int64_t row)
      : x(static_cast<const T*>(p.data) + row * p.stride),
        mask(p.token_mask ? p.token_mask + row * p.mask_stride : nullptr),
        vocab(p.vocab) {}

  __device__ __forceinline__ uint32_t allowed(int64_t i) const {
    return static_cast<uint32_t>(mask[i / 32]) >> (i % 32);
  }
  // As load_vector, with forbidden elements -inf.
  __device__ __forceinline__ ptx::Bytes16 load_allowed(int64_t i) const {
    ptx::Bytes16 v = load_vector(x, i, vocab);
    if (mask && i < vocab) forbid<T>(v, allowed(i));
    return v;
  }
};

// Vector j of a thread begins at token first_token + (j * kLogitsThreads + thread) * kPerVector in every batch, so that
// the order of sums depends on the tokens and not on addresses.
template <typename T>
struct Chunk {
  static constexpr int N = kPerVector<T>;
  ptx::Bytes16 vector[kVectors];
  uint32_t first;  // token of the thread

  __device__ __forceinline__ Chunk(const Row<T>& row, int64_t first_token, int64_t len)
      : first(static_cast<uint32_t>(first_token) + static_cast<uint32_t>(ptx::thread() * N)) {
    const int64_t end = first_token + len < row.vocab ? first_token + len : row.vocab;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) vector[j] = load_vector(row.x, token(j), token(j) < end ? row.vocab : 0);
  }
  __device__ __forceinline__ uint32_t token(int j) const {
    return first + static_cast<uint32_t>(j * kLogitsThreads * N);
  }
  __device__ __forceinline__ float value(int j, int e) const { return element<T>(vector[j], e); }

  __device__ __forceinline__ void apply_mask(const Row<T>& row) {
    if (!row.mask) return;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (token(j) < row.vocab) forbid<T>(vector[j], row.allowed(token(j)));
    }
  }
  // Ends a pass over the chunk: the next pass unpacks 16-bit elements again instead of keeping all of them as floats.
  __device__ __forceinline__ void end_pass() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) ptx::opaque(vector[j].word[k]);
    }
  }
  // Calls visit(x, token) for all elements, in token order within a vector.
  template <typename Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) visit(value(j, e), token(j) + e);
    }
  }
  // The maximum of vector j. NaN is left out.
  __device__ __forceinline__ float max_of(int j) const {
    float vector_max = value(j, 0);
#pragma unroll
    for (int e = 1; e < N; ++e) vector_max = fmaxf(vector_max, value(j, e));
    return fmaxf(vector_max, -kInf);
  }
};

}  // namespace treedecode::cuda
