#include "tree_attention.h"

#include <cmath>

#include "attention_tile.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.69314718055994531;
// Rows of the score buffer are this far apart: not a power of two, so that they fall into different cache sets.
constexpr int64_t kScoreStride = kTile + 16;

// One thread's buffers; sizes as in tree_attention_scratch.
struct Scratch {
  float* q;              // [kBlockRows, units]
  float* o;              // [kBlockRows, ceil(head_dim / 64) * 64] unnormalised output
  float* s;              // [kStripRows, kScoreStride] scores, then probabilities
  float* k;              // [kTile / kPanel, units, kPanel]
  float* v;              // [ceil(head_dim / kPanel), kTile, kPanel]
  float* max;            // [kBlockRows] running maximum, log2 units
  float* sum;            // [kBlockRows] running sum of 2^(score - max)
  float* rescale;        // [kBlockRows] factor of this tile for the older sums
  int32_t* begin;        // [kBlockRows] keys the row sees, relative to the chunk
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
  s.sum = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.rescale = reinterpret_cast<float*>(take(kBlockRows * 4));
  s.begin = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.end = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  s.branch = reinterpret_cast<int32_t*>(take(kBlockRows * 4));
  for (auto& rows : s.rows) rows = reinterpret_cast<const void**>(take(kTile * static_cast<int64_t>(sizeof(void*))));
  return s;
}

// Scores [begin, end) of one row become probabilities relative to the running maximum; begin and end are multiples of
// N, the row sees [from, to). Probabilities of unseen keys are 0. Pairs: they are stored as bf16, unit i/2 for key i.
template <bool Pairs>
void softmax_row(const TreeAttentionParams& p, float* s, int64_t begin, int64_t end, int64_t from, int64_t to,
                 float& row_max, float& row_sum, float& rescale) {
  constexpr int64_t N = Vec::N;
  if (from >= to) {
    for (int64_t i = begin; i < end; i += N) Vec::zero().store(Pairs ? s + i / 2 : s + i);
    rescale = 1.0f;
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
  const float tile_max = high.max() * scale;
  const float old_max = row_max;
  rescale = 1.0f;
  if (tile_max > old_max) {
    row_max = tile_max;
    // The first keys of the row: nothing to rescale, and (-inf) - (-inf) would be NaN.
    alignas(64) float factor[N];
    exp2_nonpositive(Vec::set(old_max - tile_max)).store(factor);
    rescale = old_max == -kInf ? 0.0f : factor[0];
  }
  const Vec base = Vec::set(row_max == -kInf ? 0.0f : row_max), factor = Vec::set(scale);
  const auto probability = [&](int64_t i) {
    return exp2_nonpositive(fma(Vec::load(s + i), factor, Vec::zero() - base));
  };
  Vec total = Vec::zero();
#if defined(TD_ISA_AVX512_BF16)
  if constexpr (Pairs) {
    int64_t i = begin;
    for (; i + 2 * N <= end; i += 2 * N) {
      const Vec x = probability(i), y = probability(i + N);
      total += x + y;
      _mm512_storeu_si512(s + i / 2, (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v));
    }
    if (i < end) {
      const Vec x = probability(i);
      total += x;
      x.store(reinterpret_cast<bf16*>(s + i / 2));
    }
    row_sum = row_sum * rescale + total.sum();
    return;
  }
#endif
  for (int64_t i = begin; i < end; i += N) {
    const Vec x = probability(i);
    total += x;
    x.store(s + i);
  }
  row_sum = row_sum * rescale + total.sum();
}

template <typename T>
void write_row(const float* o, int64_t head_dim, float factor, T* out) {
  const Vec f = Vec::set(factor);
  int64_t d = 0;
  for (; d + Vec::N <= head_dim; d += Vec::N) (Vec::load(o + d) * f).store(out + d);
  if (d < head_dim)
    (Vec::load_n(o + d, static_cast<int>(head_dim - d)) * f).store_n(out + d, static_cast<int>(head_dim - d));
}

// The denominator's sink: (lse, factor of out) with the sink's logit in it.
struct WithSink {
  double lse, factor;
};
WithSink add_sink(const TreeAttentionParams& p, int64_t head, double lse) {
  if (!p.sinks) return {lse, 1.0};
  const double sink = p.sinks[head];
  const double high = lse > sink ? lse : sink;
  if (std::isinf(high) && high < 0) return {lse, 1.0};
  const double with = high + std::log(std::exp(lse - high) + std::exp(sink - high));
  return {with, std::exp(lse - with)};
}

template <typename T>
void finish_row(const TreeAttentionParams& p, int64_t token, int64_t b, int64_t path_ordinal, int64_t head,
                const float* o, float row_max, float row_sum) {
  // sum == 0: no key seen, o was never written. (NaN is not 0.)
  const bool empty = row_sum == 0.0f;
  const double lse =
      empty ? -std::numeric_limits<double>::infinity() : row_max * kLn2 + std::log(static_cast<double>(row_sum));
  const int64_t parts = num_parts(p, b);
  if (parts > 1) {
    const int64_t at = (p.part_indptr[b] + (token - p.q_indptr[b]) * parts + path_ordinal) * p.num_qo_heads + head;
    p.part_lse[at] = static_cast<float>(lse);
    if (!empty) write_row(o, p.head_dim, 1.0f / row_sum, p.part_out + at * p.head_dim);
    return;
  }
  const int64_t at = token * p.num_qo_heads + head;
  const WithSink sink = add_sink(p, head, lse);
  p.lse[at] = static_cast<float>(sink.lse);
  T* out = static_cast<T*>(p.out) + at * p.head_dim;
  if (empty) {
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(0.0f);
  } else {
    write_row(o, p.head_dim, static_cast<float>(sink.factor / row_sum), out);
  }
}

// The first (at most kTile) tokens' rows from `begin` on, up to `end`, of a chunk's pages; how many there are.
template <typename T>
int64_t find_rows(const TreeAttentionParams& p, const int32_t* chunk, int64_t kv_head, int64_t begin, int64_t end,
                  const void** k_rows, const void** v_rows) {
  const int64_t count = end - begin < kTile ? end - begin : kTile;
  const int32_t* pages = p.page_table + chunk[0] * p.page_table_stride;
  int64_t page = begin / p.page_size, offset = begin % p.page_size;
  for (int64_t i = 0; i < count; ++page, offset = 0) {
    const T* k = static_cast<const T*>(p.k_pages) + pages[page] * p.k_stride[0] + kv_head * p.k_stride[2];
    const T* v = static_cast<const T*>(p.v_pages) + pages[page] * p.v_stride[0] + kv_head * p.v_stride[2];
    for (; i < count && offset < p.page_size; ++i, ++offset) {
      k_rows[i] = k + offset * p.k_stride[1];
      v_rows[i] = v + offset * p.v_stride[1];
    }
  }
  return count > 0 ? count : 0;
}

template <bool Pairs, typename T>
void attend_block(const TreeAttentionParams& p, const int32_t* chunk, int64_t kv_head, int64_t row_begin,
                  int64_t row_end, const int32_t* next_chunk, int64_t next_head, const Scratch& x) {
  const int64_t group = p.num_qo_heads / p.num_kv_heads;
  const int64_t units = Pairs ? p.head_dim / 2 : p.head_dim;
  const int64_t o_stride = (p.head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t v_panel_stride = (Pairs ? kTile / 2 : kTile) * kPanel;
  const int64_t n = row_end - row_begin;
  const int64_t chunk_begin = chunk[2], chunk_len = chunk[3] - chunk[2];
  const int64_t first_token = p.q_indptr[chunk[0]];

  int64_t seen_begin = chunk_len, seen_end = 0;
  int64_t b = chunk[0];
  for (int64_t r = 0; r < n; ++r) {
    const int64_t token = first_token + (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
    while (token >= p.q_indptr[b + 1]) ++b;
    const Visible seen = visible_keys(p, b, token - p.q_indptr[b]);
    const int64_t from = seen.begin < chunk_begin ? 0 : seen.begin - chunk_begin;
    const int64_t to = seen.end - chunk_begin < chunk_len ? seen.end - chunk_begin : chunk_len;
    x.branch[r] = static_cast<int32_t>(b);
    x.begin[r] = static_cast<int32_t>(from);
    x.end[r] = static_cast<int32_t>(to > from ? to : from);
    if (from < to) {
      if (from < seen_begin) seen_begin = from;
      if (to > seen_end) seen_end = to;
    }
    x.max[r] = -kInf;
    x.sum[r] = 0.0f;
    pack_row<Pairs>(static_cast<const T*>(p.q) + token * p.q_stride[0] + head * p.q_stride[1], units, x.q + r * units);
  }

  // Strips of rows whose output buffer holds something yet.
  uint64_t started = 0;
  int current = 0;
  const int64_t first_tile = seen_begin / kTile * kTile;
  const auto find = [&](int64_t tile, const void** k_rows, const void** v_rows) {
    return find_rows<T>(p, chunk, kv_head, chunk_begin + tile, chunk_begin + seen_end, k_rows, v_rows);
  };
  int64_t count = find(first_tile, x.rows[0], x.rows[1]);
  for (int64_t tile = first_tile; tile < seen_end; tile += kTile) {
    // What to prefetch while this tile is worked on: the next one, be it of this item or of the next.
    int64_t next_count = find(tile + kTile, x.rows[2 - current], x.rows[3 - current]);
    if (next_count == 0 && next_chunk) {
      next_count = find_rows<T>(p, next_chunk, next_head, next_chunk[2], next_chunk[3], x.rows[2 - current],
                                x.rows[3 - current]);
    }
    pack_keys<Pairs>(reinterpret_cast<const T* const*>(x.rows[current]),
                     reinterpret_cast<const T* const*>(x.rows[2 - current]), count, next_count, units, x.k);
    pack_values<Pairs>(reinterpret_cast<const T* const*>(x.rows[current + 1]),
                       reinterpret_cast<const T* const*>(x.rows[3 - current]), count, next_count, p.head_dim,
                       v_panel_stride, x.v);
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
      begin = begin < 0 ? 0 : begin / kPanel * kPanel;
      end = ((end < count ? end : count) + Vec::N - 1) / Vec::N * Vec::N;
      for (int64_t t = begin; t < end; t += kPanel) {
        const int64_t lanes = end - t < kPanel ? end - t : kPanel;
        multiply_panel<Pairs>(rows, lanes / Vec::N, x.q + strip * units, units, x.k + t * units, units, nullptr,
                              x.s + t, kScoreStride);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = x.begin[strip + r] - tile, to = x.end[strip + r] - tile;
        softmax_row<Pairs>(p, x.s + r * kScoreStride, begin, end, from > begin ? from : begin, to < count ? to : count,
                           x.max[strip + r], x.sum[strip + r], x.rescale[r]);
      }
      const uint64_t bit = uint64_t{1} << (strip / kStripRows);
      const int64_t skip = Pairs ? begin / 2 : begin, depth = Pairs ? (end - begin) / 2 : end - begin;
      for (int64_t d = 0; d < p.head_dim; d += kPanel) {
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
    finish_row<T>(p, token, x.branch[r], chunk[4], head, x.o + r * o_stride, x.max[r], x.sum[r]);
  }
}

template <typename T>
void merge_token(const TreeAttentionParams& p, int64_t token, int64_t first_part, int64_t parts) {
  const auto part_of = [&](int64_t i, int64_t head) { return (first_part + i) * p.num_qo_heads + head; };
  for (int64_t head = 0; head < p.num_qo_heads; ++head) {
    T* out = static_cast<T*>(p.out) + (token * p.num_qo_heads + head) * p.head_dim;
    float high = -kInf;
    bool nan = false;
    for (int64_t i = 0; i < parts; ++i) {
      const float lse = p.part_lse[part_of(i, head)];
      nan |= lse != lse;
      if (lse > high) high = lse;
    }
    if (high == -kInf && !nan) {
      for (int64_t d = 0; d < p.head_dim; ++d) out[d] = from_float<T>(0.0f);
      p.lse[token * p.num_qo_heads + head] =
          static_cast<float>(add_sink(p, head, -std::numeric_limits<double>::infinity()).lse);
      continue;
    }
    double total = 0.0;
    for (int64_t i = 0; i < parts; ++i) total += std::exp(static_cast<double>(p.part_lse[part_of(i, head)]) - high);
    const WithSink sink = add_sink(p, head, high + std::log(total));
    p.lse[token * p.num_qo_heads + head] = static_cast<float>(sink.lse);
    // Weights relative to the final lse: they sum to the share of the keys.
    for (int64_t d = 0; d < p.head_dim; d += 8 * Vec::N) {
      Vec acc[8];
      const int64_t width = p.head_dim - d < 8 * Vec::N ? p.head_dim - d : 8 * Vec::N;
      for (auto& a : acc) a = Vec::zero();
      for (int64_t i = 0; i < parts; ++i) {
        const float lse = p.part_lse[part_of(i, head)];
        if (lse == -kInf) continue;
        const Vec weight = Vec::set(static_cast<float>(std::exp(lse - sink.lse)));
        const float* part = p.part_out + part_of(i, head) * p.head_dim + d;
        for (int64_t j = 0; j * Vec::N < width; ++j) {
          const int64_t left = width - j * Vec::N;
          const Vec value =
              left >= Vec::N ? Vec::load(part + j * Vec::N) : Vec::load_n(part + j * Vec::N, static_cast<int>(left));
          acc[j] = fma(weight, value, acc[j]);
        }
      }
      for (int64_t j = 0; j * Vec::N < width; ++j) {
        const int64_t left = width - j * Vec::N;
        left >= Vec::N ? acc[j].store(out + d + j * Vec::N)
                       : acc[j].store_n(out + d + j * Vec::N, static_cast<int>(left));
      }
    }
  }
}

template <bool Pairs, typename T>
void attend(const TreeAttentionParams& p, const TreeAttentionItem& item, const TreeAttentionItem* next, void* scratch) {
  const Scratch buffers = carve(p, scratch);
  attend_block<Pairs, T>(p, p.chunks + 6 * item.chunk, item.kv_head, item.row_begin, item.row_end,
                         next ? p.chunks + 6 * next->chunk : nullptr, next ? next->kv_head : 0, buffers);
}

}  // namespace

void tree_attention(const TreeAttentionParams& p, const TreeAttentionItem& item, const TreeAttentionItem* next,
                    void* scratch) {
  switch (p.dtype) {
    case DType::F32: return attend<false, float>(p, item, next, scratch);
    case DType::BF16: return attend<kHavePairs, bf16>(p, item, next, scratch);
    case DType::F16: return attend<false, fp16>(p, item, next, scratch);
  }
}

void tree_attention_merge(const TreeAttentionParams& p, int64_t row_begin, int64_t row_end) {
  for (int64_t b = row_begin; b < row_end; ++b) {
    const int64_t parts = num_parts(p, b);
    if (parts == 1) continue;
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
