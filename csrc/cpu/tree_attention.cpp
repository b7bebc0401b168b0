#include "tree_attention.h"

#include <optional>

#include "attention_rows.h"
#include "attention_tile.h"
#include "tiles.h"

namespace treedecode::cpu::TD_ISA {
namespace {

// Rows of the score buffer are this far apart: not a power of two, so that they fall into different cache sets.
constexpr int64_t kScoreStride = kTile + 16;

// Rows of K and V that the tokens of a tile have; null for tokens that nobody reads.
struct TokenRows {
  const void** k;  // [kTile]
  const void** v;  // [kTile]
};

// One thread's buffers; sizes as in tree_attention_scratch.
struct Scratch {
  float* q;                // [kBlockRows, units]
  float* acc;              // [kBlockRows, ceil(head_dim / 64) * 64]
  float* s;                // [kStripRows, kScoreStride] scores, then probabilities
  float* k;                // [kTile / kPanel, units, kPanel]
  float* v;                // [ceil(head_dim / kPanel), kTile, kPanel]
  float* m_i;              // [kBlockRows]
  float* l_i;              // [kBlockRows, kSumLanes]
  float* alpha;            // [kBlockRows] of this tile
  int32_t* visible_begin;  // [kBlockRows] keys that the row sees, relative to the chunk's first tile
  int32_t* visible_end;    // [kBlockRows]
  int32_t* branch;         // [kBlockRows] row of the page table
  int32_t* token;          // [kBlockRows] row of q
  TokenRows rows[2];       // of this tile and of the next one, in turns
};

// Divides the scratch memory of a thread among its buffers, aligned to cache lines.
Scratch make_scratch(const TreeAttentionParams& p, void* memory) {
  char* next = static_cast<char*>(memory);
  const auto take = [&](int64_t bytes) {
    char* buffer = next;
    next += (bytes + 63) / 64 * 64;
    return buffer;
  };
  const int64_t wide = (p.head_dim + 63) / 64 * 64;
  Scratch s;
  s.q = reinterpret_cast<float*>(take(kBlockRows * p.head_dim * 4));
  s.acc = reinterpret_cast<float*>(take(kBlockRows * wide * 4));
  s.s = reinterpret_cast<float*>(take(kStripRows * kScoreStride * 4));
  s.k = reinterpret_cast<float*>(take(kTile * p.head_dim * 4));
  s.v = reinterpret_cast<float*>(take(kTile * wide * 4));
  s.m_i = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.l_i = reinterpret_cast<float*>(take(kBlockRows * kSumLanes * 4));
  s.alpha = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.visible_begin = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.visible_end = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.branch = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.token = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  for (TokenRows& rows : s.rows) {
    rows.k = reinterpret_cast<const void**>(take(kTile * static_cast<int64_t>(sizeof(void*))));
    rows.v = reinterpret_cast<const void**>(take(kTile * static_cast<int64_t>(sizeof(void*))));
  }
  return s;
}

// True if both products use tile registers. Keys go in groups of kGroup then.
template <bool Pairs>
bool uses_tiles(const TreeAttentionParams& p) {
#if defined(TD_ISA_AMX_BF16)
  return Pairs && p.head_dim % 32 == 0;
#else
  return false;
#endif
}

#if defined(TD_ISA_AMX_BF16)
// Computes c (+)= a b as multiply_panel does, with tile registers, for lanes [begin, end), which are multiples of 32.
// The buffers have room for a multiple of 16 rows; the values of rows beyond the last one do not matter.
void multiply_by_tiles(int64_t rows, int64_t begin, int64_t end, const float* a, int64_t a_stride, const float* b,
                       int64_t panel_stride, int64_t depth, bool accumulate, float* c, int64_t c_stride) {
  for (int64_t lane = begin; lane < end; lane += 32) {
    for (int64_t r = 0; r < rows; r += 32) {
      const TileProduct product{
          .a = a + r * a_stride,
          .a_stride = a_stride,
          .b = b + lane / kPanel * panel_stride + lane % kPanel,
          .b_stride = kPanel,
          .b_right = 16,
          .depth = depth,
          .c = c + r * c_stride + lane,
          .c_stride = c_stride,
          .c_right = 16,
          .c_below = 16 * c_stride,
      };
      if (rows - r > 16) multiply_tiles<2, 2>(product, accumulate);
      else multiply_tiles<1, 2>(product, accumulate);
    }
  }
}
#endif

// Turns scores [begin, end) of one row into probabilities relative to its new maximum; begin and end are multiples of
// N. Keys outside of [visible_begin, visible_end) get 0. Pairs: probabilities are stored as bf16, unit i/2 for key i.
template <bool Pairs>
void softmax_row(const TreeAttentionParams& p, float* s, int64_t begin, int64_t end, int64_t visible_begin,
                 int64_t visible_end, float& m_i, float* l_i /* [kSumLanes] */, float& alpha) {
  constexpr int64_t N = Vec::N;
  alpha = 1.0f;
  if (visible_begin >= visible_end) {
    for (int64_t i = begin; i < end; i += N) Vec::zero().store(Pairs ? s + i / 2 : s + i);
    return;
  }
  float scale = p.sm_scale * kLog2e;
  if (p.soft_cap > 0) {
    const Vec inner = Vec::set(p.sm_scale / p.soft_cap), outer = Vec::set(p.soft_cap * kLog2e);
    for (int64_t i = begin; i < end; i += N) (tanh(Vec::load(s + i) * inner) * outer).store(s + i);
    scale = 1.0f;
  }
  if (visible_begin > begin || visible_end < end) {
    const Vec first = Vec::set(static_cast<float>(visible_begin)), last = Vec::set(static_cast<float>(visible_end));
    for (int64_t i = begin; i < end; i += N) {
      if (i >= visible_begin && i + N <= visible_end) continue;
      const Vec key = Vec::iota() + Vec::set(static_cast<float>(i));
      select((key >= first) & (key < last), Vec::load(s + i), Vec::set(-kInf)).store(s + i);
    }
  }
  Vec lane_max = Vec::load(s + begin);
  for (int64_t i = begin + N; i < end; i += N) lane_max = max(Vec::load(s + i), lane_max);
  const float tile_max = __builtin_ceilf(lane_max.max() * scale);
  if (tile_max > m_i) {
    alpha = power_of_two(m_i - tile_max);  // 0 for the first keys of the row
    m_i = tile_max;
  }
  const Vec base = Vec::set(m_i == -kInf ? 0.0f : m_i), factor = Vec::set(scale);
  const auto probability = [&](int64_t i) { return exp2_above(Vec::load(s + i) * factor, base); };
  // Key i is added to lane i % kSumLanes wherever the tile begins: N divides kSumLanes, and begin is a multiple of N.
  constexpr int64_t kSums = kSumLanes / N;
  Vec sums[kSums];
  for (int64_t j = 0; j < kSums; ++j) sums[j] = Vec::load(l_i + j * N) * Vec::set(alpha);
#if defined(TD_ISA_AVX512_BF16)
  if constexpr (Pairs) {
    int64_t i = begin;
    for (; i + 2 * N <= end; i += 2 * N) {
      const Vec x = probability(i), y = probability(i + N);
      sums[0] += x;
      sums[0] += y;
      _mm512_storeu_si512(s + i / 2, (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v));
    }
    if (i < end) {
      const Vec x = probability(i);
      sums[0] += x;
      x.store(reinterpret_cast<bf16*>(s + i / 2));
    }
    sums[0].store(l_i);
    return;
  }
#endif
  for (int64_t i = begin; i < end; i += N) {
    const Vec x = probability(i);
    sums[i / N % kSums] += x;
    x.store(s + i);
  }
  for (int64_t j = 0; j < kSums; ++j) sums[j].store(l_i + j * N);
}

// Looks up the rows of K and V of the tile that begins at token `tile`, null for tokens before `begin`. Returns how
// many tokens the tile has, up to `end`.
template <typename T>
int64_t find_rows(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t kv_head, int64_t tile, int64_t begin,
                  int64_t end, const TokenRows& rows) {
  const int64_t count = end - tile < kTile ? end - tile : kTile;
  const int32_t* pages = p.page_table + p.order[chunk.row_begin] * p.page_table_stride;
  int64_t i = 0;
  for (; i < begin - tile; ++i) rows.k[i] = rows.v[i] = nullptr;
  int64_t page = (tile + i) / p.page_size, offset = (tile + i) % p.page_size;
  for (; i < count; ++page, offset = 0) {
    const T* k = static_cast<const T*>(p.k_pages) + pages[page] * p.k_stride.page + kv_head * p.k_stride.head;
    const T* v = static_cast<const T*>(p.v_pages) + pages[page] * p.v_stride.page + kv_head * p.v_stride.head;
    for (; i < count && offset < p.page_size; ++i, ++offset) {
      rows.k[i] = k + offset * p.k_stride.token;
      rows.v[i] = v + offset * p.v_stride.token;
    }
  }
  return count > 0 ? count : 0;
}

// Computes one item, and prefetches the pages of `next` meanwhile, if it is not null.
template <bool Pairs, typename T>
void attend_item(const TreeAttentionParams& p, const TreeAttentionItem& item, const TreeAttentionItem* next,
                 const Scratch& buf) {
  const ChainedChunk& chunk = p.chunks[item.chunk];
  const int64_t kv_head = item.kv_head, row_begin = item.row_begin, n = item.row_end - item.row_begin;
  const int64_t group = p.num_qo_heads / p.num_kv_heads;
  const int64_t units = Pairs ? p.head_dim / 2 : p.head_dim;
  const int64_t acc_stride = (p.head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t v_panel_stride = (Pairs ? kTile / 2 : kTile) * kPanel;
  const bool tiled = uses_tiles<Pairs>(p);
  const int64_t step = tiled ? kGroup : Vec::N;  // keys that are computed together
  // Tiles begin at multiples of kTile, so that a key has the same place in a tile in every chunk. From here on tokens
  // are counted from the first tile's.
  const int64_t first = chunk.token_begin / kTile * kTile;
  const int64_t chunk_begin = chunk.token_begin - first, chunk_end = chunk.token_end - first;
  // A group of keys across the end of the chunk belongs to the next chunk, for the rows that go on there: so a key is
  // added together with the same other keys wherever chunks begin and end. Rows of the next chunk have the same pages
  // before it.
  const int64_t work_begin = tiled ? chunk_begin / kGroup * kGroup : chunk_begin;
  const int64_t work_end = tiled ? chunk_end / kGroup * kGroup : chunk_end;

  int64_t visible_begin = chunk_end, visible_end = 0;
  int64_t row = chunk.row_begin;
  const int64_t first_planned = p.row_indptr[row];
  for (int64_t r = 0; r < n; ++r) {
    const auto [token, b] = query_at(p, first_planned + (row_begin + r) / group, row);
    const int64_t head = kv_head * group + (row_begin + r) % group;
    const Visible visible = visible_keys(p, b, token - p.q_indptr[b]);
    const int64_t from = visible.begin - first < work_begin ? work_begin : visible.begin - first;
    const int64_t last = visible.end - first;  // the chunks before had the keys up to chunk_begin
    const int64_t to = last <= chunk_begin ? from : last <= chunk_end ? last : work_end;
    buf.branch[r] = static_cast<int32_t>(b);
    buf.token[r] = static_cast<int32_t>(token);
    buf.visible_begin[r] = static_cast<int32_t>(from);
    buf.visible_end[r] = static_cast<int32_t>(to > from ? to : from);
    if (from < to) {
      if (from < visible_begin) visible_begin = from;
      if (to > visible_end) visible_end = to;
    }
    start_row(p, chunk, token, b, head, buf.acc + r * acc_stride, acc_stride, buf.m_i[r], buf.l_i + r * kSumLanes);
    pack_row<Pairs>(static_cast<const T*>(p.q) + token * p.q_stride.token + head * p.q_stride.head, units,
                    buf.q + r * units);
  }

  // One bit for each strip of rows whose acc has been written.
  uint64_t started = chunk.round > 0 ? ~uint64_t{0} : 0;
  int current = 0;
  const int64_t first_tile = visible_begin / kTile * kTile;
  const auto find = [&](int64_t tile, const TokenRows& rows) {
    return find_rows<T>(p, chunk, kv_head, first + tile, first + visible_begin, first + visible_end, rows);
  };
  int64_t count = find(first_tile, buf.rows[0]);
  for (int64_t tile = first_tile; tile < visible_end; tile += kTile) {
    // The next tile, of this item or of the next one, is prefetched while this tile is computed.
    int64_t next_count = find(tile + kTile, buf.rows[1 - current]);
    if (next_count == 0 && next) {
      const ChainedChunk& next_chunk = p.chunks[next->chunk];
      next_count = find_rows<T>(p, next_chunk, next->kv_head, next_chunk.token_begin, next_chunk.token_begin,
                                next_chunk.token_end, buf.rows[1 - current]);
    }
    pack_keys<Pairs>(reinterpret_cast<const T* const*>(buf.rows[current].k),
                     reinterpret_cast<const T* const*>(buf.rows[1 - current].k), count, next_count, units, buf.k);
    bool has_values = false;  // values are packed after the first scores
    for (int64_t strip = 0; strip < n; strip += kStripRows) {
      const int64_t rows = n - strip < kStripRows ? n - strip : kStripRows;
      int64_t begin = count, end = 0;
      for (int64_t r = strip; r < strip + rows; ++r) {
        const int64_t from = buf.visible_begin[r] - tile, to = buf.visible_end[r] - tile;
        if (from >= to || from >= count || to <= 0) continue;
        if (from < begin) begin = from;
        if (to > end) end = to;
      }
      if (begin >= end) continue;
      begin = begin < 0 ? 0 : begin / step * step;
      end = ((end < count ? end : count) + step - 1) / step * step;
      if (tiled) {
#if defined(TD_ISA_AMX_BF16)
        multiply_by_tiles(rows, begin, end, buf.q + strip * units, units, buf.k, units * kPanel, units, false, buf.s,
                          kScoreStride);
#endif
      }
      for (int64_t t = begin, next; t < end && !tiled; t = next) {
        const int64_t panel = t / kPanel * kPanel;
        next = panel + kPanel < end ? panel + kPanel : end;
        multiply_panel<Pairs>(rows, (next - t) / Vec::N, buf.q + strip * units, units,
                              buf.k + panel * units + (t - panel), units, nullptr, buf.s + t, kScoreStride);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = buf.visible_begin[strip + r] - tile, to = buf.visible_end[strip + r] - tile;
        softmax_row<Pairs>(p, buf.s + r * kScoreStride, begin, end, from > begin ? from : begin,
                           to < count ? to : count, buf.m_i[strip + r], buf.l_i + (strip + r) * kSumLanes,
                           buf.alpha[r]);
      }
      if (!has_values) {
        pack_values<Pairs>(reinterpret_cast<const T* const*>(buf.rows[current].v),
                           reinterpret_cast<const T* const*>(buf.rows[1 - current].v), count, next_count, p.head_dim,
                           v_panel_stride, buf.v);
        has_values = true;
      }
      const uint64_t bit = uint64_t{1} << (strip / kStripRows);
      const int64_t skip = Pairs ? begin / 2 : begin, depth = Pairs ? (end - begin) / 2 : end - begin;
#if defined(TD_ISA_AMX_BF16)
      if (tiled) {
        for (int64_t r = 0; r < rows && started & bit; ++r) {
          if (buf.alpha[r] == 1.0f) continue;
          float* acc = buf.acc + (strip + r) * acc_stride;
          for (int64_t d = 0; d < acc_stride; d += Vec::N) (Vec::load(acc + d) * Vec::set(buf.alpha[r])).store(acc + d);
        }
        multiply_by_tiles(rows, 0, p.head_dim, buf.s + skip, kScoreStride, buf.v + skip * kPanel, v_panel_stride, depth,
                          started & bit, buf.acc + strip * acc_stride, acc_stride);
      }
#endif
      for (int64_t d = 0; d < p.head_dim && !tiled; d += kPanel) {
        const int64_t lanes = p.head_dim - d < kPanel ? p.head_dim - d : kPanel;
        multiply_panel<Pairs>(rows, (lanes + Vec::N - 1) / Vec::N, buf.s + skip, kScoreStride,
                              buf.v + d / kPanel * v_panel_stride + skip * kPanel, depth,
                              started & bit ? buf.alpha : nullptr, buf.acc + strip * acc_stride + d, acc_stride);
      }
      started |= bit;
    }
    count = next_count;
    current = 1 - current;
  }

  for (int64_t r = 0; r < n; ++r) {
    const int64_t head = kv_head * group + (row_begin + r) % group;
    finish_row<T>(p, chunk, buf.token[r], buf.branch[r], head, buf.acc + r * acc_stride, buf.m_i[r],
                  buf.l_i + r * kSumLanes);
  }
}

template <bool Pairs, typename T>
void attend(const TreeAttentionParams& p, const TreeAttentionItem* items, int64_t count, void* scratch) {
  const Scratch buffers = make_scratch(p, scratch);
#if defined(TD_ISA_AMX_BF16)
  std::optional<Tiles> tiles;
  if (uses_tiles<Pairs>(p)) tiles.emplace();
#endif
  for (int64_t i = 0; i < count; ++i)
    attend_item<Pairs, T>(p, items[i], i + 1 < count ? items + i + 1 : nullptr, buffers);
}

}  // namespace

void tree_attention(const TreeAttentionParams& p, const TreeAttentionItem* items, int64_t count, void* scratch) {
  switch (p.dtype) {
    case DType::F32: return attend<false, float>(p, items, count, scratch);
    case DType::BF16: return attend<kHavePairs, bf16>(p, items, count, scratch);
    case DType::F16: return attend<false, fp16>(p, items, count, scratch);
  }
}

void tree_attention_merge(const TreeAttentionParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t b = row_begin; b < row_end; ++b) {
    const int64_t parts = num_parts(p, b);
    if (parts == 1) continue;  // written where it ended
    for (int64_t token = p.q_indptr[b]; token < p.q_indptr[b + 1]; ++token) {
      const int64_t first_part = p.part_indptr[b] + (token - p.q_indptr[b]) * parts;
      switch (p.dtype) {
        case DType::F32: merge_token<float>(p, token, first_part, parts); break;
        case DType::BF16: merge_token<bf16>(p, token, first_part, parts); break;
        case DType::F16: merge_token<fp16>(p, token, first_part, parts); break;
      }
    }
  }
}

}  // namespace treedecode::cpu::TD_ISA
