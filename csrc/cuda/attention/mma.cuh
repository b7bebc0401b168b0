// tree_attention on tensor cores, for 16-bit values: mma.sync and cp.async, sm_80 and later.
#pragma once

#include <algorithm>

#include "sums.cuh"

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
        sums_(thread_) {}

  __device__ void run(const Tile& tile) {
    if (thread_ == 0) rows_.tile = tile;
    keys_ = static_cast<const T*>(p_.k_pages) + tile.kv_head * p_.k_stride.head;
    values_ = static_cast<const T*>(p_.v_pages) + tile.kv_head * p_.v_stride.head;
    copy_queries(tile);
    ptx::cp_async_commit();
    if (p_.window_left >= 0) {  // which keys come first depends on the rows
      prepare_rows(tile);
      ptx::sync_threads();
    }
    const int begin = p_.window_left < 0 ? tile.token_begin : first_key();
    first_ = tile.token_begin + (begin - tile.token_begin) / S::kKeys * S::kKeys;
    constexpr int kPerPass = kAttentionThreads / S::kKeys;
#pragma unroll
    for (int i = 0; i < (S::kStages + kPerPass - 1) / kPerPass; ++i) {
      const int n = i * kPerPass + thread_ / S::kKeys;
      if (n < S::kStages) place_key(n, page_of(tile, n));
    }
    if (p_.window_left < 0) prepare_rows(tile);
    ptx::sync_threads();
    find_ranges();

    for (int j = 0; j < S::kStages; ++j) {
      copy_keys(j);
      ptx::cp_async_commit();
      if (j == S::kStages - 1) break;  // the place of the queries
      copy_values(j);
      ptx::cp_async_commit();
    }
    load_queries();
    attend();
    finish();
  }

 private:
  // Copies.

  __device__ char* keys(int n) const { return shared_ + n % S::kStages * 2 * S::kTileBytes; }
  __device__ char* values(int n) const { return keys(n) + S::kTileBytes; }

  __device__ void copy_queries(const Tile& tile) const {
    const T* q = static_cast<const T*>(p_.q);
    for (unsigned i = thread_; i < kRows * kWords; i += kAttentionThreads) {
      const int row = static_cast<int>(i / kWords), word = static_cast<int>(i % kWords);
      const bool valid = row < tile.num_rows && 8 * word < p_.head_dim;
      const PackedRow r = packed_row(p_, tile, valid ? row : 0);
      ptx::cp_async<16>(shared_ + S::kQueryOffset + swizzled<kDim>(row, word),
                        q + r.token * p_.q_stride.token + r.head * p_.q_stride.head + (valid ? 8 * word : 0), valid);
    }
  }

  __device__ int64_t token_of(int n) const { return static_cast<int64_t>(first_) + n * S::kKeys + thread_ % S::kKeys; }

  // Page id of this thread's key of the n-th tile of keys; -1 beyond the chunk, where table entries and pages may hold
  // anything.
  __device__ int page_of(const Tile& tile, int n) {
    const int64_t token = token_of(n);
    if (token >= tile.token_end) return -1;
    const auto column = static_cast<uint32_t>(token) / static_cast<uint32_t>(ptx::opaque(p_.page_size));
    const int page = p_.page_table[tile.row_begin * p_.page_table_stride + column];
    if (page >= 0 && page < p_.num_pages) return page;
    is_bad_ = true;
    return -1;
  }

  __device__ void place_key(int n, int page) const {
    const int64_t slot = static_cast<uint32_t>(token_of(n)) % static_cast<uint32_t>(ptx::opaque(p_.page_size));
    const int key = thread_ % S::kKeys, at = n % kLookahead;
    rows_.key_at[at][key] = page < 0 ? nullptr : keys_ + page * p_.k_stride.page + slot * p_.k_stride.token;
    rows_.value_at[at][key] = page < 0 ? nullptr : values_ + page * p_.v_stride.page + slot * p_.v_stride.token;
  }

  __device__ void copy(const void* const (&row_at)[kMaxKeys], char* to) const {
    const unsigned thread = ptx::opaque(thread_), head_dim = static_cast<unsigned>(p_.head_dim);
    constexpr bool kWholeRows = kAttentionThreads % kWords == 0;  // the thread's word is the same in all of its rows
    constexpr unsigned kPasses = S::kKeys * kWords / kAttentionThreads;
    const auto key = [&](unsigned i) {
      return kWholeRows ? i * (kAttentionThreads / kWords) + thread / kWords
                        : (i * kAttentionThreads + thread) / kWords;
    };
    const auto word = [&](unsigned i) { return (kWholeRows ? thread : i * kAttentionThreads + thread) % kWords; };
    const void* rows[kPasses];  // all of them first: none waits for shared memory by itself
#pragma unroll
    for (unsigned i = 0; i < kPasses; ++i) rows[i] = row_at[key(i)];
#pragma unroll
    for (unsigned i = 0; i < kPasses; ++i) {
      ptx::cp_async<16>(to + swizzled<kDim>(key(i), word(i)), static_cast<const char*>(rows[i]) + 16 * word(i),
                        rows[i] != nullptr && 8 * word(i) < head_dim);
    }
  }
  __device__ void copy_keys(int n) const {
    if (n < num_tiles_) copy(rows_.key_at[n % kLookahead], keys(n));
  }
  __device__ void copy_values(int n) const {
    if (n < num_tiles_) copy(rows_.value_at[n % kLookahead], values(n));
  }

  // Rows.

  // Rows beyond the last repeat it, so that they neither ask for more keys nor for a mask.
  __device__ void prepare_rows(const Tile& tile) {
    const int row = thread_;
    if (row >= kRows) return;
    const RowInfo info = row_info(p_, tile, row < tile.num_rows ? row : tile.num_rows - 1);
    rows_.begin[row] = info.begin;
    rows_.end[row] = info.end;
    rows_.slot[row] = info.slot;
  }

  __device__ int first_key() const {
    int begin = rows_.begin[lane_ % kRows];
    for (int row = lane_; row < kRows; row += ptx::kWarpSize) begin = std::min(begin, rows_.begin[row]);
    return -warp_max(-begin);
  }

  __device__ void find_ranges() {
    int end = 0;
    for (int row = lane_ % kRows; row < kRows; row += ptx::kWarpSize) end = std::max(end, rows_.end[row]);
    end = warp_max(end);
    num_tiles_ = end > first_ ? (end - first_ + S::kKeys - 1) / S::kKeys : 0;
    constexpr int kMine = 16 * S::kRowBlocks;
    const int row = row_warp_ * kMine + lane_ % kMine;
    any_begin_ = -warp_max(-rows_.begin[row]);
    any_end_ = warp_max(rows_.end[row]);
    all_begin_ = warp_max(rows_.begin[row]);
    all_end_ = -warp_max(-rows_.end[row]);
  }

  // Products.

  // Where ldmatrix finds the lane's rows of the first fragment of queries.
  __device__ unsigned first_query(unsigned lane) const {
    return swizzled<kDim>(row_warp_ * S::kRowBlocks * 16 + lane % 16, lane / 16);
  }
  __device__ void query_fragment(uint32_t (&a)[4], unsigned first, int block, int step) const {
    ptx::ldmatrix_x4(a, shared_ + S::kQueryOffset + swizzled_from<kDim>(first, block, step));
  }

  __device__ void load_queries() {
    if constexpr (S::kQueriesInRegisters) {
      ptx::cp_async_wait<2 * S::kStages - 1>();
      ptx::sync_threads();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) query_fragment(q_[step], first_query(lane_), 0, step);
    }
  }

  __device__ void attend() {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
      sums_.max[b][0] = sums_.max[b][1] = kNone;
      sums_.sum[b][0] = sums_.sum[b][1] = 0.0f;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        sums_.out[b][d][0] = sums_.out[b][d][1] = sums_.out[b][d][2] = sums_.out[b][d][3] = 0.0f;
    }
    const bool finds_pages = thread_ < S::kKeys;
    int next_page = finds_pages ? page_of(rows_.tile, S::kStages) : -1;
    for (int j = 0; j < num_tiles_; ++j) {
      const int begin = first_ + j * S::kKeys + key_warp_ * S::kWarpKeys, end = begin + S::kWarpKeys;
      const bool sees = begin < any_end_ && end > any_begin_;
      uint32_t w[S::kRowBlocks][S::kWarpKeys / 16][4];
      ptx::cp_async_wait<2 * S::kStages - 2>();
      ptx::sync_threads();  // keys of tile j are there, and values of tile j - 1 have been used
      copy_values(j + S::kStages - 1);
      ptx::cp_async_commit();
      if (sees) {
        float s[S::kRowBlocks][S::kWarpKeys / 8][4];
        score(keys(j), s);
        soften(s);
        if (begin < all_begin_ || end > all_end_) hide(begin, s);
        exponentiate(s, w);
      }
      if (finds_pages) place_key(j + S::kStages, next_page);
      ptx::cp_async_wait<2 * S::kStages - 2>();
      ptx::sync_threads();  // values of tile j are there, and keys of tile j have been used
      copy_keys(j + S::kStages);
      ptx::cp_async_commit();
      if (finds_pages) next_page = page_of(rows_.tile, j + S::kStages + 1);
      if (sees) weigh(values(j), w);
    }
    ptx::cp_async_wait<0>();
  }

  __device__ void score(const char* k, float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 8; ++n) s[b][n][0] = s[b][n][1] = s[b][n][2] = s[b][n][3] = 0.0f;
    }
    const unsigned lane = ptx::opaque(lane_), query = first_query(lane);
    const unsigned key = swizzled<kDim>(key_warp_ * S::kWarpKeys + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[S::kRowBlocks][4];
#pragma unroll
      for (int b = 0; b < S::kRowBlocks; ++b) {
        if constexpr (S::kQueriesInRegisters) {
          for (int i = 0; i < 4; ++i) a[b][i] = q_[step][i];
        } else {
          query_fragment(a[b], query, b, step);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kWarpKeys / 16; ++n) {
        uint32_t r[4];
        ptx::ldmatrix_x4(r, k + swizzled_from<kDim>(key, n, step));
        const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<T>(s[b][2 * n], a[b], left);
          ptx::mma_m16n8k16<T>(s[b][2 * n + 1], a[b], right);
        }
      }
    }
  }

  __device__ void soften(float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
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

  __device__ void hide(int begin, float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4]) const {
    const int key = begin + lane_ % 4 * 2;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = sums_.row_of_lane(b, half);
        const int from = rows_.begin[row] - key, to = rows_.end[row] - key;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * n + e < from || 8 * n + e >= to) s[b][n][2 * half + e] = kNone;
          }
        }
      }
    }
  }

  // Scores become probabilities relative to the new maximum, and older sums are brought to it. `w` are fragments of T.
  __device__ void exponentiate(float (&s)[S::kRowBlocks][S::kWarpKeys / 8][4],
                               uint32_t (&w)[S::kRowBlocks][S::kWarpKeys / 16][4]) {
    const float scale = p_.scale;
#pragma unroll
    for (int b = 0; b < S::kRowBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = kNone;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n) high = fmaxf(high, fmaxf(s[b][n][2 * half], s[b][n][2 * half + 1]));
        high = fmaxf(high, ptx::shfl_xor(high, 1));
        high = fmaxf(high, ptx::shfl_xor(high, 2));
        const float before = sums_.max[b][half], now = fmaxf(before, high * scale);
        const float base = now == kNone ? 0.0f : now;  // (-inf) - (-inf) would be NaN
        const float rescale = ptx::exp2_approx(before - base);
        sums_.max[b][half] = now;
        float sum = sums_.sum[b][half] * rescale;
#pragma unroll
        for (int n = 0; n < S::kWarpKeys / 8; ++n) {
          const float x = ptx::exp2_approx(ptx::fma(s[b][n][2 * half], scale, -base));
          const float y = ptx::exp2_approx(ptx::fma(s[b][n][2 * half + 1], scale, -base));
          sum += x + y;
          w[b][n / 2][n % 2 * 2 + half] = ptx::pack<T>(x, y);
        }
        sums_.sum[b][half] = sum;
        if (!ptx::any(rescale != 1.0f)) continue;  // as for most tiles after the first ones
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          sums_.out[b][d][2 * half] *= rescale;
          sums_.out[b][d][2 * half + 1] *= rescale;
        }
      }
    }
  }

  __device__ void weigh(const char* v, const uint32_t (&w)[S::kRowBlocks][S::kWarpKeys / 16][4]) {
    const unsigned lane = ptx::opaque(lane_);
    const unsigned key = swizzled<kDim>(key_warp_ * S::kWarpKeys + lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < S::kWarpKeys / 16; ++n) {
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t r[4];
        ptx::ldmatrix_x4_trans(r, v + swizzled_from<kDim>(key, n, d));
        const uint32_t left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
#pragma unroll
        for (int b = 0; b < S::kRowBlocks; ++b) {
          ptx::mma_m16n8k16<T>(sums_.out[b][2 * d], w[b][n], left);
          ptx::mma_m16n8k16<T>(sums_.out[b][2 * d + 1], w[b][n], right);
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
        sums_.sum[b][half] += ptx::shfl_xor(sums_.sum[b][half], 1);
        sums_.sum[b][half] += ptx::shfl_xor(sums_.sum[b][half], 2);
      }
    }
    const bool is_bad = ptx::sync_threads_or(is_bad_);  // and nothing in the ring is used any more
    if constexpr (S::kKeyWarps > 1)
      sums_.template finish_together<T>(p_, rows_, reinterpret_cast<float*>(shared_), is_bad);
    else sums_.template finish_alone<T>(p_, rows_, is_bad);
    ptx::sync_threads();  // the next tile takes the place of all this
  }

  const TreeAttentionParams& p_;
  char* shared_;
  RowBuffers& rows_;
  const T* keys_;  // of the kv head
  const T* values_;
  int thread_, lane_;
  int row_warp_, key_warp_;
  int first_ = 0;                    // token of the first key that is read
  int num_tiles_ = 0;                // of keys
  int any_begin_ = 0, any_end_ = 0;  // keys that any row of the warp sees
  int all_begin_ = 0, all_end_ = 0;  // and that all of them see
  bool is_bad_ = false;
  uint32_t q_[S::kQueriesInRegisters ? kDim / 16 : 1][4];
  RowSums<kDim, kRows> sums_;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    _tree_attention_mma_kernel(const __grid_constant__ TreeAttentionParams p) {
  ptx::launch_next_kernel();        // the merge, which waits for this one's results
  ptx::wait_for_previous_kernel();  // append_kv, in a decoder
  if (!plan_fits(p)) return;
  char* shared = ptx::dynamic_shared<char>();
  for (int round = 0;; ++round) {
    const int64_t item = item_of_block(round);
    if (item >= p.counts->num_tiles * p.num_kv_heads) return;
    Tile tile = tile_at(p, item);
    if (tile.num_rows == 0) continue;
    if (tile.num_rows <= 16) {
      TileAttention<T, kDim, 16>(p, shared).run(tile);
    } else if (tile.num_rows <= 32) {
      TileAttention<T, kDim, 32>(p, shared).run(tile);
    } else if (tile.num_rows <= 64) {
      TileAttention<T, kDim, 64>(p, shared).run(tile);
    } else if constexpr (kDim <= 128) {
      TileAttention<T, kDim, 128>(p, shared).run(tile);
    } else {  // registers hold the sums of 64 rows
      for (int rest = tile.num_rows; rest > 0; rest -= 64, tile.first_row += 64) {
        tile.num_rows = rest < 64 ? rest : 64;
        TileAttention<T, kDim, 64>(p, shared).run(tile);
      }
    }
  }
}

}  // namespace treedecode::cuda
