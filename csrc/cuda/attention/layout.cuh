// Layout of shared memory in the tensor core kernel of tree_attention, and the share of each warp in a tile.
#pragma once

#include "tiles.cuh"

namespace treedecode::cuda {

inline constexpr int kMaxKeys = 64;   // of a tile
inline constexpr int kLookahead = 4;  // tiles of keys whose addresses are in RowBuffers
inline constexpr int kNumWarps = kAttentionThreads / ptx::kWarpSize;

// Shared memory: a ring of tiles of K and V, the queries where they do not stay in registers, then RowBuffers. The ring
// is sized for few rows, whose kernel waits for memory; with many rows the queries are in the ring, and fewer tiles
// fit.
template <int kDim>
struct Ring {
  static constexpr int kStages = kDim <= 96 ? 3 : kDim <= 128 ? 2 : 1;
  static constexpr int kBytes = kStages * 2 * kMaxKeys * kDim * 2;
  static constexpr int kQueryBytes = kDim > 128 ? 64 * kDim * 2 : 0;
};

// State of the softmax of each row, by each warp that has a part of the keys.
struct WarpStates {
  float m_i[kNumWarps * 16];  // [kKeyWarps, kRows]
  float l_i[kNumWarps * 16];  // [kKeyWarps, kRows]
};

struct RowBuffers {
  Tile tile;  // in shared memory, because the state of the softmax needs the registers
  int visible_begin[kTileRows];
  int visible_end[kTileRows];
  int slot[kTileRows];                       // as in RowInfo
  const void* v_rows[kLookahead][kMaxKeys];  // a key's row of V; null: no key
  union {
    const void* k_rows[kLookahead][kMaxKeys];  // and of K
    WarpStates warps;                          // after the last key, where warps share the keys
  };
};

template <int kDim>
constexpr int mma_shared_bytes() {
  return Ring<kDim>::kBytes + Ring<kDim>::kQueryBytes + static_cast<int>(sizeof(RowBuffers));
}

// Four warps share a tile of kRows packed rows and kKeys keys. Few rows: each warp takes other keys, and their states
// are merged at the end. Many rows: each warp takes other rows, and fewer keys at a time where acc needs most of the
// registers.
template <int kDim, int kRows>
struct Split {
  static constexpr int kRowBlocks = kRows == 128 ? 2 : 1;    // of 16 rows, per warp
  static constexpr int kRowWarps = kRows / 16 / kRowBlocks;  // warps side by side over rows
  static constexpr int kKeyWarps = kNumWarps / kRowWarps;    // and over keys
  static constexpr int kKeys = kKeyWarps == 1 && kRowBlocks * kDim > 128 ? kMaxKeys / 2 : kMaxKeys;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kTileBytes = kKeys * kDim * 2;  // of K, or of V
  static constexpr bool kQueriesInRegisters = kRows < 128 && kDim <= 128;
  static constexpr int kTilePairs = (Ring<kDim>::kBytes - (kRows == 128 ? kRows * kDim * 2 : 0)) / (2 * kTileBytes);
  static constexpr int kStages = kTilePairs < kLookahead ? kTilePairs : kLookahead - 1;
  // Queries on their way to registers lie where the last of the first tiles of V will be.
  static constexpr int kQueryOffset = kQueriesInRegisters ? (2 * kStages - 1) * kTileBytes
                                      : kRows < 128       ? Ring<kDim>::kBytes
                                                          : 2 * kStages * kTileBytes;
  static_assert(kStages >= 1);
  static_assert(kKeyWarps == 1 || kKeyWarps * kRows <= kNumWarps * 16);
  static_assert(kKeyWarps == 1 || kKeyWarps * kRows * kDim * 4 <= Ring<kDim>::kBytes);
};

// Words of 16 bytes, in a row of kDim 16-bit values, that a swizzle permutes among themselves.
template <int kDim>
inline constexpr unsigned kSwizzleSpan = kDim % 64 == 0   ? 8
                                         : kDim % 32 == 0 ? 4
                                                          : 2;

// Byte offset of a word of a row. ldmatrix reads the same word of eight consecutive rows at once: swizzled, these lie
// in different banks.
template <int kDim>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned word) {
  constexpr unsigned kWords = kDim / 8, kSpan = kSwizzleSpan<kDim>;
  static_assert(kWords % kSpan == 0);
  return (row * kWords + (word ^ (row / (8 / kSpan) % kSpan))) * 16;
}
// Returns swizzled(row + 16 * blocks, word + 2 * step), given `first` = swizzled(row, word) of word 0 or 1. Constant
// `blocks` and `step` fold to constants, which saves five instructions for each ldmatrix.
template <int kDim>
__device__ __forceinline__ unsigned swizzled_from(unsigned first, unsigned blocks, unsigned step) {
  constexpr unsigned kSpan = kSwizzleSpan<kDim>;
  const unsigned word = 2 * step;
  return (first ^ (word % kSpan * 16)) + word / kSpan * kSpan * 16 + blocks * (16 * kDim * 2);
}

}  // namespace treedecode::cuda
