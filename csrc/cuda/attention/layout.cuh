// How the tensor core kernel of tree_attention lays out shared memory and shares a tile among its warps.
#pragma once

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kMaxKeys = 64;   // of a tile
inline constexpr int kLookahead = 4;  // tiles of keys whose places are at hand
inline constexpr int kNumWarps = kAttentionThreads / ptx::kWarpSize;

// Shared memory: a ring of tiles of K and V, the queries where they do not stay in registers, then RowBuffers. The ring
// is sized for few rows, who wait for memory; many rows take queries out of it and have fewer tiles under way.
template <int kDim>
struct Ring {
  static constexpr int kStages = kDim <= 96 ? 3 : kDim <= 128 ? 2 : 1;
  static constexpr int kBytes = kStages * 2 * kMaxKeys * kDim * 2;
  static constexpr int kQueryBytes = kDim > 128 ? 64 * kDim * 2 : 0;
};

struct RowBuffers {
  Tile tile;  // here, because registers are for sums
  int begin[kTileRows];
  int end[kTileRows];
  int slot[kTileRows];
  const void* value_at[kLookahead][kMaxKeys];  // a key's row of V; null: no key
  union {
    const void* key_at[kLookahead][kMaxKeys];  // and of K
    float sums[2][kNumWarps * 16];             // maximum and sum of each row by each warp, when all keys are done
  };
};

template <int kDim>
constexpr int mma_shared_bytes() {
  return Ring<kDim>::kBytes + Ring<kDim>::kQueryBytes + static_cast<int>(sizeof(RowBuffers));
}

// How four warps share a tile of kRows packed rows and kKeys keys. Few rows: each takes other keys, sums are merged at
// the end. Many rows: each takes other rows, and fewer keys at a time where the sums need most of the registers.
template <int kDim, int kRows>
struct Split {
  static constexpr int kRowBlocks = kRows == 128 ? 2 : 1;    // of 16 rows, per warp
  static constexpr int kRowWarps = kRows / 16 / kRowBlocks;  // warps side by side over rows
  static constexpr int kKeyWarps = kNumWarps / kRowWarps;    // and over keys
  static constexpr int kKeys = kKeyWarps == 1 && kRowBlocks * kDim > 128 ? kMaxKeys / 2 : kMaxKeys;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kTileBytes = kKeys * kDim * 2;  // of K, or of V
  static constexpr bool kQueriesInRegisters = kRows < 128 && kDim <= 128;
  static constexpr int kRoom = (Ring<kDim>::kBytes - (kRows == 128 ? kRows * kDim * 2 : 0)) / (2 * kTileBytes);
  static constexpr int kStages = kRoom < kLookahead ? kRoom : kLookahead - 1;
  // Queries on their way to registers take the place of the last tile of V to come.
  static constexpr int kQueryOffset = kQueriesInRegisters ? (2 * kStages - 1) * kTileBytes
                                      : kRows < 128       ? Ring<kDim>::kBytes
                                                          : 2 * kStages * kTileBytes;
  static_assert(kStages >= 1);
  static_assert(kKeyWarps == 1 || kKeyWarps * kRows <= kNumWarps * 16);
  static_assert(kKeyWarps == 1 || kKeyWarps * kRows * kDim * 4 <= Ring<kDim>::kBytes);
};

// Words of 16 bytes, of a row of kDim 16-bit values, that change places.
template <int kDim>
inline constexpr unsigned kSwizzleSpan = kDim % 64 == 0   ? 8
                                         : kDim % 32 == 0 ? 4
                                                          : 2;

// Byte offset of a word of a row: swizzled, so that the same word of eight rows that follow one another, which ldmatrix
// reads at once, lies in different banks.
template <int kDim>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned word) {
  constexpr unsigned kWords = kDim / 8, kSpan = kSwizzleSpan<kDim>;
  static_assert(kWords % kSpan == 0);
  return (row * kWords + (word ^ (row / (8 / kSpan) % kSpan))) * 16;
}
// swizzled(row + 16 * blocks, word + 2 * step) from `first` = swizzled(row, word), word 0 or 1: constants, where these
// are, for what would be five instructions for each ldmatrix.
template <int kDim>
__device__ __forceinline__ unsigned swizzled_from(unsigned first, unsigned blocks, unsigned step) {
  constexpr unsigned kSpan = kSwizzleSpan<kDim>;
  const unsigned word = 2 * step;
  return (first ^ (word % kSpan * 16)) + word / kSpan * kSpan * 16 + blocks * (16 * kDim * 2);
}

}  // namespace treedecode::cuda
