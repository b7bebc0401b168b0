// tree_attention on tensor cores, for 16-bit values: mma.sync and cp.async, sm_80 and later. K and V arrive in a ring
// of tiles in shared memory, while the tensor cores multiply the tiles before.
//
// Per query row, in units of log2: m_i is the running maximum of the scaled scores, l_i the running sum of
// p = 2^(score - m_i), acc that of p @ v; alpha = 2^(old m_i - new m_i) brings l_i and acc to a new maximum.
#pragma once

#include <algorithm>

#include "softmax_state.cuh"

namespace treedecode::cuda {

template <typename T, int kDim, int kRows>
class TileAttention {
  using S = Split<kDim, kRows>;
  static constexpr unsigned kWords = kDim / 8;

 public:
  __device__ TileAttention(const TreeAttentionParams& p, char* shared)
      : p_(p),
        shared_(shared),
        rows_(*reinterpret_cast<RowBuffers*>(shared + Ring<kDim>::kBytes + Ring<kDim>::kQueryBytes)),
        thread_(ptx::opaque(ptx::thread())),
        lane_(thread_ % ptx::kWarpSize),
        row_warp_(thread_ / ptx::kWarpSize % S::kRowWarps),
        key_warp_(thread_ / ptx::kWarpSize / S::kRowWarps),
        state_(thread_) {}

  __device__ void run(const Tile& tile) {
    if (thread_ == 0) rows_.tile = tile;
    k_head_ = static_cast<const T*>(p_.k_pages) + tile.kv_head * p_.k_stride.head;
    v_head_ = static_cast<const T*>(p_.v_pages) + tile.kv_head * p_.v_stride.head;
    copy_q(tile);
    ptx::cp_async_commit();
    if (p_.window_left >= 0) {  // the window of the rows decides where keys begin
      prepare_rows(tile);
      ptx::sync_threads();
    }
    const int begin = p_.window_left < 0 ? tile.token_begin : first_visible_key();
    first_token_ = tile.token_begin + (begin - tile.token_begin) / S::kKeys * S::kKeys;
    constexpr int kPerPass = kAttentionThreads / S::kKeys;
#pragma unroll
    for (int i = 0; i < (S::kStages + kPerPass - 1) / kPerPass; ++i) {
      const int n = i * kPerPass + thread_ / S::kKeys;
      if (n < S::kStages) store_row_addresses(n, page_of(tile, n, begin));
    }
    if (p_.window_left < 0) prepare_rows(tile);
    ptx::sync_threads();
    find_visible_ranges();

    for (int j = 0; j < S::kStages; ++j) {
      copy_k(j);
      ptx::cp_async_commit();
      if (j == S::kStages - 1) break;  // its tile of V still holds the queries
      copy_v(j);
      ptx::cp_async_commit();
    }
    load_q();
    attend();
    finish();
  }

 private:
  // Copies.

  __device__ char* k_tile(int n) const { return shared_ + n % S::kStages * 2 * S::kTileBytes; }
  __device__ char* v_tile(int n) const { return k_tile(n) + S::kTileBytes; }

  __device__ void copy_q(const Tile& tile) const {
    const T* q = static_cast<const T*>(p_.q);
    for (unsigned i = thread_; i < kRows * kWords; i += kAttentionThreads) {
      const int row = static_cast<int>(i / kWords), word = static_cast<int>(i % kWords);
      const bool valid = row < tile.num_rows && 8 * word < p_.head_dim;
      const PackedRow r = packed_row(p_, tile, valid ? row : 0);
      ptx::cp_async<16>(shared_ + S::kQueryOffset + swizzled<kDim>(row, word),
                        q + r.token * p_.q_stride.token + r.head * p_.q_stride.head + (valid ? 8 * word : 0), valid);
    }
  }

  __device__ int64_t token_of(int n) const {
    return static_cast<int64_t>(first_token_) + n * S::kKeys + thread_ % S::kKeys;
  }

  // Page id of this thread's key of the n-th tile of keys; -1 before `begin` and beyond the end of the chunk, where
  // table entries and pages may hold anything.
  __device__ int page_of(const Tile& tile, int n, int begin = 0) {
    const int64_t token = token_of(n);
    if (token < begin || token >= tile.token_end) return -1;
    const auto column = static_cast<uint32_t>(token) / static_cast<uint32_t>(ptx::opaque(p_.page_size));
    const int page = p_.page_table[tile.branch * p_.page_table_stride + column];
    if (page >= 0 && page < p_.num_pages) return page;
    has_bad_page_ = true;
    return -1;
  }

  __device__ void store_row_addresses(int n, int page) const {
    const int64_t slot = static_cast<uint32_t>(token_of(n)) % static_cast<uint32_t>(ptx::opaque(p_.page_size));
    const int key = thread_ % S::kKeys, buffer = n % kLookahead;
    rows_.k_rows[buffer][key] = page < 0 ? nullptr : k_head_ + page * p_.k_stride.page + slot * p_.k_stride.token;
    rows_.v_rows[buffer][key] = page < 0 ? nullptr : v_head_ + page * p_.v_stride.page + slot * p_.v_stride.token;
  }

  __device__ void copy(const void* const (&rows)[kMaxKeys], char* tile) const {
    const unsigned thread = ptx::opaque(thread_), head_dim = static_cast<unsigned>(p_.head_dim);
    constexpr bool kWholeRows = kAttentionThreads % kWords == 0;  // the thread's word is the same in all of its rows
    constexpr unsigned kPasses = S::kKeys * kWords / kAttentionThreads;
    const auto key = [&](unsigned i) {
      return kWholeRows ? i * (kAttentionThreads / kWords) + thread / kWords
                        : (i * kAttentionThreads + thread) / kWords;
    };
    const auto word = [&](unsigned i) { return (kWholeRows ? thread : i * kAttentionThreads + thread) % kWords; };
    const void* sources[kPasses];  // read before the copies, so that the reads of shared memory overlap
#pragma unroll
    for (unsigned i = 0; i < kPasses; ++i) sources[i] = rows[key(i)];
#pragma unroll
    for (unsigned i = 0; i < kPasses; ++i) {
      ptx::cp_async<16>(tile + swizzled<kDim>(key(i), word(i)), static_cast<const char*>(sources[i]) + 16 * word(i),
                        sources[i] != nullptr && 8 * word(i) < head_dim);
    }
  }
  __device__ void copy_k(int n) const {
    if (n < num_tiles_) copy(rows_.k_rows[n % kLookahead], k_tile(n));
  }
  __device__ void copy_v(int n) const {
    if (n < num_tiles_) copy(rows_.v_rows[n % kLookahead], v_tile(n));
  }

  // Rows.

  // Rows beyond the last one repeat it, so that they widen no range of keys.
  __device__ void prepare_rows(const Tile& tile) {
    const int row = thread_;
    if (row >= kRows) return;
    const RowInfo info = row_info(p_, tile, row < tile.num_rows ? row : tile.num_rows - 1);
    rows_.visible_begin[row] = info.visible_begin;
    rows_.visible_end[row] = info.visible_end;
    rows_.slot[row] = info.slot;
  }

  __device__ int first_visible_key() const {
    int begin = rows_.visible_begin[lane_ % kRows];
    for (int row = lane_; row < kRows; row += ptx::kWarpSize) begin = std::min(begin, rows_.visible_begin[row]);
    return -warp_max(-begin);
  }

  __device__ void find_visible_ranges() {
    int end = 0;
    for (int row = lane_ % kRows; row < kRows; row += ptx::kWarpSize) end = std::max(end, rows_.visible_end[row]);
    end = warp_max(end);
    num_tiles_ = end > first_token_ ? (end - first_token_ + S::kKeys - 1) / S::kKeys : 0;
    constexpr int kWarpRows = 16 * S::kRowBlocks;
    const int row = row_warp_ * kWarpRows + lane_ % kWarpRows;
    any_begin_ = -warp_max(-rows_.visible_begin[row]);
    any_end_ = warp_max(rows_.visible_end[row]);
    all_begin_ = warp_max(rows_.visible_begin[row]);
    all_end_ = -warp_max(-rows_.visible_end[row]);
  }

  // Products.

  // Byte offset of the row of the first fragment of queries whose address this lane gives to ldmatrix.
  __device__ unsigned first_q_offset(unsigned lane) const {
    return swizzled<kDim>(row_warp_ * S::kRowBlocks * 16 + lane % 16, lane / 16);
  }
  __device__ void load_q_fragment(uint32_t (&a)[4], unsigned first, int block, int step) const {
    ptx::ldmatrix_x4(a, shared_ + S::kQueryOffset + swizzled_from<kDim>(first, block, step));
  }

  __device__ void load_q() {
    if constexpr (S::kQueriesInRegisters) {
      ptx::cp_async_wait<2 * S::kStages - 1>();
      ptx::sync_threads();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) load_q_fragment(q_[step], first_q_offset(lane_), 0, step);
    }
  }

  __device__ void attend() {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
      state_.m_i[b][0] = state_.m_i[b][1] = kMinusInf;
      state_.l_i[b][0] = state_.l_i[b][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        state_.acc[b][d][0] = state_.acc[b][d][1] = state_.acc[b][d][2] = state_.acc[b][d][3] = 0.0f;
    }
    const bool loads_pages = thread_ < S::kKeys;
    int next_page = loads_pages ? page_of(rows_.tile, S::kStages) : -1;
    for (int j = 0; j < num_tiles_; ++j) {
      const int begin = first_token_ + j * S::kKeys + key_warp_ * S::kWarpKeys, end = begin + S::kWarpKeys;
      const bool is_visible = begin < any_end_ && end > any_begin_;
      uint32_t probs[S::kRowBlocks][S::kWarpKeys / 16][4];
      ptx::cp_async_wait<2 * S::kStages - 2>();
      ptx::sync_threads();  // K of tile j has arrived, and nobody needs V of tile j - 1 any more
      copy_v(j + S::kStages - 1);
      ptx::cp_async_commit();
      if (is_visible) {
        float s[S::kRowBlocks][S::kWarpKeys / 8][4];
        multiply_qk(k_tile(j), s);
        apply_soft_cap(s);
        if (begin < all_begin_ || end > all_end_) apply_mask(begin, s);
        update_softmax(s, probs);
      }
      if (loads_pages) store_row_addresses(j + S::kStages, next_page);
      ptx::cp_async_wait<2 * S::kStages - 2>();
      ptx::sync_threads();  // V of tile j has arrived, and nobody needs K of tile j any more
      copy_k(j + S::kStages);
      ptx::cp_async_commit();
      if (loads_pages) next_page = page_of(rows_.tile, j + S::kStages + 1);
      if (is_visible) accumulate_pv(v_tile(j), probs);
    }
    ptx::cp_async_wait<0>();
  }

  __device__ void multiply_qk(const char* k, float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 8; ++n) s[b][n][0] = s[b][n][1] = s[b][n][2] = s[b][n][3] = 0.0f;
    }
    const unsigned lane = ptx::opaque(lane_), query = first_q_offset(lane);
    const unsigned key = swizzled<kDim>(key_warp_ * S::kWarpKeys + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[S::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) {
        if constexpr (S::kQueriesInRegisters) {
          for (int i = 0; i < 4; ++i) a[b][i] = q_[step][i];
        } else {
          load_q_fragment(a[b], query, b, step);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 16; ++n) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, k + swizzled_from<kDim>(key, n, step));
        const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<T>(s[b][2 * n], a[b], b0);
          ptx::mma_m16n8k16<T>(s[b][2 * n + 1], a[b], b1);
        }
      }
    }
  }

  __device__ void apply_soft_cap(float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
    if (p_.soft_cap <= 0) return;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][n][e] = p_.soft_cap * tanhf(s[b][n][e] * p_.cap_scale);
      }
    }
  }

  __device__ void apply_mask(int begin, float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
    const int key = begin + lane_ % 4 * 2;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = state_.row_of_lane(b, half);
        const int visible_begin = rows_.visible_begin[row] - key, visible_end = rows_.visible_end[row] - key;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * n + e < visible_begin || 8 * n + e >= visible_end) s[b][n][2 * half + e] = kMinusInf;
          }
        }
      }
    }
  }

  // Turns scores into probabilities relative to the new maximum, in fragments of T, and brings l_i and acc to it.
  __device__ void update_softmax(float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4],
                                 uint32_t (&probs)[S::kRowBlocks][S::kWarpKeys / 16][4]) {
    const float scale = p_.scale;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tile_max = kMinusInf;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n)
          tile_max = fmaxf(tile_max, fmaxf(s[b][n][2 * half], s[b][n][2 * half + 1]));
        tile_max = fmaxf(tile_max, ptx::shfl_xor(tile_max, 1));
        tile_max = fmaxf(tile_max, ptx::shfl_xor(tile_max, 2));
        const float m_old = state_.m_i[b][half], m_new = fmaxf(m_old, tile_max * scale);
        const float base = m_new == kMinusInf ? 0.0f : m_new;  // (-inf) - (-inf) would be NaN
        const float alpha = ptx::exp2_approx(m_old - base);
        state_.m_i[b][half] = m_new;
        float l_new = state_.l_i[b][half] * alpha;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n) {
          const float x = ptx::exp2_approx(ptx::fma(s[b][n][2 * half], scale, -base));
          const float y = ptx::exp2_approx(ptx::fma(s[b][n][2 * half + 1], scale, -base));
          l_new += x + y;
          probs[b][n / 2][n % 2 * 2 + half] = ptx::pack<T>(x, y);
        }
        state_.l_i[b][half] = l_new;
        if (!ptx::any(alpha != 1.0f)) continue;  // the maximum seldom grows after the first tiles
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          state_.acc[b][d][2 * half] *= alpha;
          state_.acc[b][d][2 * half + 1] *= alpha;
        }
      }
    }
  }

  __device__ void accumulate_pv(const char* v, const uint32_t (&probs)[S::kRowBlocks][S::kWarpKeys / 16][4]) {
    const unsigned lane = ptx::opaque(lane_);
    const unsigned key = swizzled<kDim>(key_warp_ * S::kWarpKeys + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r, v + swizzled_from<kDim>(key, n, d));
        const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<T>(state_.acc[b][2 * d], probs[b][n], b0);
          ptx::mma_m16n8k16<T>(state_.acc[b][2 * d + 1], probs[b][n], b1);
        }
      }
    }
  }

  // Results.

  __device__ void finish() {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        state_.l_i[b][half] += ptx::shfl_xor(state_.l_i[b][half], 1);
        state_.l_i[b][half] += ptx::shfl_xor(state_.l_i[b][half], 2);
      }
    }
    const bool has_bad_page = ptx::sync_threads_or(has_bad_page_);  // and nobody needs the ring any more
    if constexpr (S::kKeyWarps > 1)
      state_.template merge_and_store<T>(p_, rows_, reinterpret_cast<float*>(shared_), has_bad_page);
    else state_.template store<T>(p_, rows_, has_bad_page);
    ptx::sync_threads();  // the next tile overwrites shared memory
  }

  const TreeAttentionParams& p_;
  char* shared_;
  RowBuffers& rows_;
  const T* k_head_;  // K and V of the kv head, in the first page
  const T* v_head_;
  int thread_, lane_;
  int row_warp_, key_warp_;
  int first_token_ = 0;              // of the first key that is read
  int num_tiles_ = 0;                // of keys
  int any_begin_ = 0, any_end_ = 0;  // keys that any row of the warp sees
  int all_begin_ = 0, all_end_ = 0;  // keys that all of its rows see
  bool has_bad_page_ = false;
  uint32_t q_[S::kQueriesInRegisters ? kDim / 16 : 1][4];
  SoftmaxState<kDim, kRows> state_;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    _tree_attention_mma_kernel(const __grid_constant__ TreeAttentionParams p) {
  ptx::launch_next_kernel();        // the merge, which waits for the results
  ptx::wait_for_previous_kernel();  // append_kv, in a decoder
  if (!plan_fits(p)) return;
  char* shared = ptx::dynamic_shared<char>();
  for (int round = 0;; ++round) {
    const int64_t item = item_of_block(round);
    if (item >= p.counts->num_tiles * p.num_kv_heads) return;
    Tile tile = load_tile(p, item);
    if (tile.num_rows == 0) continue;
    if (tile.num_rows <= 16) {
      TileAttention<T, kDim, 16>(p, shared).run(tile);
    } else if (tile.num_rows <= 32) {
      TileAttention<T, kDim, 32>(p, shared).run(tile);
    } else if (tile.num_rows <= 64) {
      TileAttention<T, kDim, 64>(p, shared).run(tile);
    } else if constexpr (kDim <= 128) {
      TileAttention<T, kDim, 128>(p, shared).run(tile);
    } else {  // registers hold acc of 64 rows at most
      for (int remaining = tile.num_rows; remaining > 0; remaining -= 64, tile.first_row += 64) {
        tile.num_rows = remaining < 64 ? remaining : 64;
        TileAttention<T, kDim, 64>(p, shared).run(tile);
      }
    }
  }
}

}  // namespace treedecode::cuda
