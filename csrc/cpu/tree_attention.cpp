#include "tree_attention.h"

#include <optional>

#include "attention_rows.h"
#include "attention_tile.h"
#include "tiles.h"

namespace treedecode::cpu::TD_ISA {
namespace {

// Rows of the score buffer are this far apart: not a power of two, so that they fall into different cache sets.
constexpr int64_t kScoreStride = kTile + 16;

// One thread's buffers; sizes as in tree_attention_scratch.
struct Scratch {
  float* q;              // [kBlockRows, units]
  float* o;              // [kBlockRows, ceil(head_dim / 64) * 64] unnormalised output
  float* s;              // [kStripRows, kScoreStride] scores, then probabilities
  float* k;              // [kTile / kPanel, units, kPanel]
  float* v;              // [ceil(head_dim / kPanel), kTile, kPanel]
  float* max;            // [kBlockRows] running maximum rounded up to a whole number, log2 units
  float* sum;            // [kBlockRows, kSumLanes] running sums of 2^(score - max)
  float* rescale;        // [kBlockRows] factor of this tile for the older sums, a power of two
  int32_t* begin;        // [kBlockRows] keys the row sees, relative to the chunk's first tile
  int32_t* end;          // [kBlockRows]
  int32_t* branch;       // [kBlockRows] row of the page table
  const void** rows[4];  // [kTile] token rows of K and V: this tile's, the next one's
};

Scratch carve(const TreeAttentionParams& p, void* memory) {
  char* at = static_cast<char*>(memory);
  const auto take = [&](int64_t bytes) {
    char* result = at;
    at += (bytes + 63) / 64 * 64;
    return result;
  };
  const int64_t wide = (p.head_dim + 63) / 64 * 64;
  Scratch s;
  s.q = reinterpret_cast<float*>(take(kBlockRows * p.head_dim * 4));
  s.o = reinterpret_cast<float*>(take(kBlockRows * wide * 4));
  s.s = reinterpret_cast<float*>(take(kStripRows * kScoreStride * 4));
  s.k = reinterpret_cast<float*>(take(kTile * p.head_dim * 4));
  s.v = reinterpret_cast<float*>(take(kTile * wide * 4));
  s.max = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.sum = reinterpret_cast<float*>(take(kBlockRows * kSumLanes * 4));
  s.rescale = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.begin = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.end = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.branch = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  for (auto& rows : s.rows) rows = reinterpret_cast<const void**>(take(kTile * static_cast<int64_t>(sizeof(void*))));
  return s;
}

// Whether both products go through tile registers. Keys go in groups of kGroup then.
template <bool Pairs>
bool uses_tiles(const TreeAttentionParams& p) {
#if defined(TD_ISA_AMX_BF16)
  return Pairs && p.head_dim % 32 == 0;
#else
  return false;
#endif
}

#if defined(TD_ISA_AMX_BF16)
// c (+)= a b as multiply_panel computes it, by tile registers: of any number of rows (the buffers have room for a
// multiple of 16, and what is in the spare ones does not matter) and of lanes [begin, end), multiples of 32.
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

// Scores [begin, end) of one row become probabilities relative to the running maximum; begin and end are multiples of
// N, the row sees [from, to). Probabilities of unseen keys are 0. Pairs: they are stored as bf16, unit i/2 for key i.
template <bool Pairs>
void softmax_row(const TreeAttentionParams& p, float* s, int64_t begin, int64_t end, int64_t from, int64_t to,
                 float& row_max, float* row_sum, float& rescale) {
  constexpr int64_t N = Vec::N;
  rescale = 1.0f;
  if (from >= to) {
    for (int64_t i = begin; i < end; i += N) Vec::zero().store(Pairs ? s + i / 2 : s + i);
    return;
  }
  float scale = p.sm_scale * kLog2e;
  if (p.soft_cap > 0) {
    const Vec inner = Vec::set(p.sm_scale / p.soft_cap), outer = Vec::set(p.soft_cap * kLog2e);
    for (int64_t i = begin; i < end; i += N) (tanh(Vec::load(s + i) * inner) * outer).store(s + i);
    scale = 1.0f;
  }
  if (from > begin || to < end) {
    const Vec first = Vec::set(static_cast<float>(from)), last = Vec::set(static_cast<float>(to));
    for (int64_t i = begin; i < end; i += N) {
      if (i >= from && i + N <= to) continue;
      const Vec key = Vec::iota() + Vec::set(static_cast<float>(i));
      select((key >= first) & (key < last), Vec::load(s + i), Vec::set(-kInf)).store(s + i);
    }
  }
  Vec high = Vec::load(s + begin);
  for (int64_t i = begin + N; i < end; i += N) high = max(Vec::load(s + i), high);
  const float tile_max = __builtin_ceilf(high.max() * scale);
  if (tile_max > row_max) {
    rescale = power_of_two(row_max - tile_max);  // 0 for the first keys of the row
    row_max = tile_max;
  }
  const Vec base = Vec::set(row_max == -kInf ? 0.0f : row_max), factor = Vec::set(scale);
  const auto probability = [&](int64_t i) { return exp2_above(Vec::load(s + i) * factor, base); };
  // Where keys begin in the lanes decides nothing: N divides kSumLanes, and begin is a multiple of N.
  constexpr int64_t kSums = kSumLanes / N;
  Vec sums[kSums];
  for (int64_t j = 0; j < kSums; ++j) sums[j] = Vec::load(row_sum + j * N) * Vec::set(rescale);
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
    sums[0].store(row_sum);
    return;
  }
#endif
  for (int64_t i = begin; i < end; i += N) {
    const Vec x = probability(i);
    sums[i / N % kSums] += x;
    x.store(s + i);
  }
  for (int64_t j = 0; j < kSums; ++j) sums[j].store(row_sum + j * N);
}

// Rows of K and V of the tile that begins at token `tile`: null below `begin`, and none from `end` on. How many.
template <typename T>
int64_t find_rows(const TreeAttentionParams& p, const ChainedChunk& chunk, int64_t kv_head, int64_t tile, int64_t begin,
                  int64_t end, const void** k_rows, const void** v_rows) {
  const int64_t count = end - tile < kTile ? end - tile : kTile;
  const int32_t* pages = p.page_table + chunk.row_begin * p.page_table_stride;
  int64_t i = 0;
  for (; i < begin - tile; ++i) k_rows[i] = v_rows[i] = nullptr;
  int64_t page = (tile + i) / p.page_size, offset = (tile + i) % p.page_size;
  for (; i < count; ++page, offset = 0) {
    const T* k = static_cast<const T*>(p.k_pages) + pages[page] * p.k_stride.page + kv_head * p.k_stride.head;
    const T* v = static_cast<const T*>(p.v_pages) + pages[page] * p.v_stride.page + kv_head * p.v_stride.head;
    for (; i < count && offset < p.page_size; ++i, ++offset) {
      k_rows[i] = k + offset * p.k_stride.token;
      v_rows[i] = v + offset * p.v_stride.token;
    }
  }
  return count > 0 ? count : 0;
}

// One item; the pages of `next`, if not null, are prefetched meanwhile.
template <bool Pairs, typename T>
void attend_item(const TreeAttentionParams& p, const TreeAttentionItem& item, const TreeAttentionItem* next,
                 const Scratch& x) {
  const ChainedChunk& chunk = p.chunks[item.chunk];
  const int64_t kv_head = item.kv_head, row_begin = item.row_begin, n = item.row_end - item.row_begin;
  const int64_t group = p.num_qo_heads / p.num_kv_heads;
  const int64_t units = Pairs ? p.head_dim / 2 : p.head_dim;
  const int64_t o_stride = (p.head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t v_panel_stride = (Pairs ? kTile / 2 : kTile) * kPanel;
  const bool tiled = uses_tiles<Pairs>(p);
  const int64_t step = tiled ? kGroup : Vec::N;  // keys that are worked on together
  // Tiles begin at multiples of kTile, so that a key has its place in a tile whatever chunk it is in. Tokens are
  // counted from the first one on.
  const int64_t first = chunk.token_begin / kTile * kTile;
  const int64_t chunk_begin = chunk.token_begin - first, chunk_end = chunk.token_end - first;
  const int64_t first_token = p.q_indptr[chunk.row_begin];
  // A group of keys across the chunk's border is the next chunk's, for those rows that go on there: so a key is added
  // with the same others wherever chunks begin and end. Rows of the next chunk have the same pages before it.
  const int64_t work_begin = tiled ? chunk_begin / kGroup * kGroup : chunk_begin;
  const int64_t work_end = tiled ? chunk_end / kGroup * kGroup : chunk_end;

  int64_t seen_begin = chunk_end, seen_end = 0;
  int64_t b = chunk.row_begin;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t token = first_token + (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
    while (token >= p.q_indptr[b + 1]) ++b;
    const Visible seen = visible_keys(p, b, token - p.q_indptr[b]);
    const int64_t from = seen.begin - first < work_begin ? work_begin : seen.begin - first;
    const int64_t last = seen.end - first;  // up to chunk_begin the chunks before have had it
    const int64_t to = last <= chunk_begin ? from : last <= chunk_end ? last : work_end;
    x.branch[r] = static_cast<int32_t>(b);
    x.begin[r] = static_cast<int32_t>(from);
    x.end[r] = static_cast<int32_t>(to > from ? to : from);
    if (from < to) {
      if (from < seen_begin) seen_begin = from;
      if (to > seen_end) seen_end = to;
    }
    start_row(p, chunk, token, b, head, x.o + r * o_stride, o_stride, x.max[r], x.sum + r * kSumLanes);
    pack_row<Pairs>(static_cast<const T*>(p.q) + token * p.q_stride.token + head * p.q_stride.head, units,
                    x.q + r * units);
  }

  // Strips of rows whose output buffer holds something yet.
  uint64_t started = chunk.round > 0 ? ~uint64_t{0} : 0;
  int current = 0;
  const int64_t first_tile = seen_begin / kTile * kTile;
  const auto find = [&](int64_t tile, const void** k_rows, const void** v_rows) {
    return find_rows<T>(p, chunk, kv_head, first + tile, first + work_begin, first + seen_end, k_rows, v_rows);
  };
  int64_t count = find(first_tile, x.rows[0], x.rows[1]);
  for (int64_t tile = first_tile; tile < seen_end; tile += kTile) {
    // What to prefetch while this tile is worked on: the next one, be it of this item or of the next.
    int64_t next_count = find(tile + kTile, x.rows[2 - current], x.rows[3 - current]);
    if (next_count == 0 && next) {
      const ChainedChunk& next_chunk = p.chunks[next->chunk];
      next_count = find_rows<T>(p, next_chunk, next->kv_head, next_chunk.token_begin, next_chunk.token_begin,
                                next_chunk.token_end, x.rows[2 - current], x.rows[3 - current]);
    }
    pack_keys<Pairs>(reinterpret_cast<const T* const*>(x.rows[current]),
                     reinterpret_cast<const T* const*>(x.rows[2 - current]), count, next_count, units, x.k);
    bool has_values = false;  // packed when the first scores are done
    for (int64_t strip = 0; strip < n; strip += kStripRows) {
      const int64_t rows = n - strip < kStripRows ? n - strip : kStripRows;
      int64_t begin = count, end = 0;
      for (int64_t r = strip; r < strip + rows; ++r) {
        const int64_t from = x.begin[r] - tile, to = x.end[r] - tile;
        if (from >= to || from >= count || to <= 0) continue;
        if (from < begin) begin = from;
        if (to > end) end = to;
      }
      if (begin >= end) continue;
      begin = begin < 0 ? 0 : begin / step * step;
      end = ((end < count ? end : count) + step - 1) / step * step;
      if (tiled) {
#if defined(TD_ISA_AMX_BF16)
        multiply_by_tiles(rows, begin, end, x.q + strip * units, units, x.k, units * kPanel, units, false, x.s,
                          kScoreStride);
#endif
      }
      for (int64_t t = begin, next; t < end && !tiled; t = next) {
        const int64_t panel = t / kPanel * kPanel;
        next = panel + kPanel < end ? panel + kPanel : end;
        multiply_panel<Pairs>(rows, (next - t) / Vec::N, x.q + strip * units, units, x.k + panel * units + (t - panel),
                              units, nullptr, x.s + t, kScoreStride);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = x.begin[strip + r] - tile, to = x.end[strip + r] - tile;
        softmax_row<Pairs>(p, x.s + r * kScoreStride, begin, end, from > begin ? from : begin, to < count ? to : count,
                           x.max[strip + r], x.sum + (strip + r) * kSumLanes, x.rescale[r]);
      }
      if (!has_values) {
        pack_values<Pairs>(reinterpret_cast<const T* const*>(x.rows[current + 1]),
                           reinterpret_cast<const T* const*>(x.rows[3 - current]), count, next_count, p.head_dim,
                           v_panel_stride, x.v);
        has_values = true;
      }
      const uint64_t bit = uint64_t{1} << (strip / kStripRows);
      const int64_t skip = Pairs ? begin / 2 : begin, depth = Pairs ? (end - begin) / 2 : end - begin;
#if defined(TD_ISA_AMX_BF16)
      if (tiled) {
        for (int64_t r = 0; r < rows && started & bit; ++r) {
          if (x.rescale[r] == 1.0f) continue;
          float* o = x.o + (strip + r) * o_stride;
          for (int64_t d = 0; d < o_stride; d += Vec::N) (Vec::load(o + d) * Vec::set(x.rescale[r])).store(o + d);
        }
        multiply_by_tiles(rows, 0, p.head_dim, x.s + skip, kScoreStride, x.v + skip * kPanel, v_panel_stride, depth,
                          started & bit, x.o + strip * o_stride, o_stride);
      }
#endif
      for (int64_t d = 0; d < p.head_dim && !tiled; d += kPanel) {
        const int64_t lanes = p.head_dim - d < kPanel ? p.head_dim - d : kPanel;
        multiply_panel<Pairs>(rows, (lanes + Vec::N - 1) / Vec::N, x.s + skip, kScoreStride,
                              x.v + d / kPanel * v_panel_stride + skip * kPanel, depth,
                              started & bit ? x.rescale : nullptr, x.o + strip * o_stride + d, o_stride);
      }
      started |= bit;
    }
    count = next_count;
    current = 2 - current;
  }

  for (int64_t r = 0; r < n; ++r) {
    const int64_t token = first_token + (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
    finish_row<T>(p, chunk, token, x.branch[r], head, x.o + r * o_stride, x.max[r], x.sum + r * kSumLanes);
  }
}

template <bool Pairs, typename T>
void attend(const TreeAttentionParams& p, const TreeAttentionItem* items, int64_t count, void* scratch) {
  const Scratch buffers = carve(p, scratch);
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
