#include "packed_linear.h"

#include <type_traits>

#include "tiles.h"
#include "vec.h"

namespace treedecode::cpu::TD_ISA {
namespace {

constexpr int kVecs = kPanel / Vec::N;  // registers across a panel
#if defined(TD_ISA_AVX512)
constexpr int kAccumulators = 24;  // of 32 registers
#elif defined(TD_ISA_AVX2)
constexpr int kAccumulators = 12;  // of 16
#else
constexpr int kAccumulators = 8;
#endif
#if defined(TD_ISA_AVX512_BF16)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif
constexpr int kMaxPanels = 4;          // panels of a register tile, when rows are few
constexpr int64_t kRowsPerPass = 256;  // rows of x that stay in cache during a pass over the panels

// Sums of a row block and up to kMaxPanels panels, before the epilogue.
struct Tile {
  alignas(64) float v[kMaxPanels][kRowBlock][kPanel];
};

// x: [k_size, 16] fp32, the block's rows side by side; w: [k_size, 16] per panel, bf16 as [k_size / 2, 16, 2].
template <typename T, int ROWS, int PANELS>
void multiply(const float* x, const T* w, int64_t k_size, int row, Tile& tile) {
  constexpr int COLS = PANELS * kVecs;
  Vec acc[ROWS][COLS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) acc[r][c] = Vec::zero();
  x += row;
  const int64_t panel_size = k_size * kPanel;
  if constexpr (std::is_same_v<T, bf16>) {
    for (int64_t k = 0; k < k_size; k += 2, x += 2 * kRowBlock, w += 2 * kPanel) {
      Vec even[COLS], odd[COLS];
      for (int c = 0; c < COLS; ++c)
        Vec::load_pairs(w + (c / kVecs) * panel_size + (c % kVecs) * 2 * Vec::N, even[c], odd[c]);
      for (int r = 0; r < ROWS; ++r) {
        const Vec a = Vec::set(x[r]);
        for (int c = 0; c < COLS; ++c) acc[r][c] = fma(a, even[c], acc[r][c]);
      }
      for (int r = 0; r < ROWS; ++r) {
        const Vec a = Vec::set(x[kRowBlock + r]);
        for (int c = 0; c < COLS; ++c) acc[r][c] = fma(a, odd[c], acc[r][c]);
      }
    }
  } else {
    for (int64_t k = 0; k < k_size; ++k, x += kRowBlock, w += kPanel) {
      Vec b[COLS];
      for (int c = 0; c < COLS; ++c) b[c] = Vec::load(w + (c / kVecs) * panel_size + (c % kVecs) * Vec::N);
      for (int r = 0; r < ROWS; ++r) {
        const Vec a = Vec::set(x[r]);
        for (int c = 0; c < COLS; ++c) acc[r][c] = fma(a, b[c], acc[r][c]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLS; ++c) acc[r][c].store(&tile.v[c / kVecs][row + r][(c % kVecs) * Vec::N]);
}

#if defined(TD_ISA_AVX512_BF16)
// x: [k_size / 2, 16, 2] bf16, a pair of neighbouring k per row.
template <typename T, int ROWS, int PANELS>
void multiply(const bf16* x, const bf16* w, int64_t k_size, int row, Tile& tile) {
  __m512 acc[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < PANELS; ++c) acc[r][c] = _mm512_setzero_ps();
  const int32_t* pair = reinterpret_cast<const int32_t*>(x) + row;
  const int64_t panel_size = k_size * kPanel;
  for (int64_t k = 0; k < k_size; k += 2, pair += kRowBlock, w += 2 * kPanel) {
    __m512bh b[PANELS];
    for (int c = 0; c < PANELS; ++c) b[c] = (__m512bh)_mm512_loadu_si512(w + c * panel_size);
    _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair[r]);
      for (int c = 0; c < PANELS; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], b[c], a);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < PANELS; ++c) _mm512_store_ps(tile.v[c][row + r], acc[r][c]);
}
#endif

// The type of packed x that this instruction set multiplies with weights of type T.
template <typename T>
using PackedX = std::conditional_t<kBf16Dot && std::is_same_v<T, bf16>, bf16, float>;

// Multiplies `rows` rows by PANELS panels into `tile`. Rows go in register tiles of a few fixed heights; the spare rows
// of the last one are zeros.
template <typename T, int PANELS>
void block(const PackedX<T>* x, const T* w, int64_t k_size, int rows, Tile& tile) {
  constexpr int LIMIT = kAccumulators / (PANELS * kVecs);
  int row = 0;
  while (row < rows) {
    const int remaining = rows - row;
    if constexpr (LIMIT >= 16) {
      if (remaining > 8) return multiply<T, 16, PANELS>(x, w, k_size, row, tile);
    }
    if constexpr (LIMIT >= 8) {
      if (remaining > 6) {
        multiply<T, 8, PANELS>(x, w, k_size, row, tile);
        row += 8;
        continue;
      }
    }
    if constexpr (LIMIT >= 4) {
      if (remaining > 2) {
        multiply<T, 4, PANELS>(x, w, k_size, row, tile);
        row += 4;
        continue;
      }
    }
    if constexpr (LIMIT >= 2) {
      if (remaining > 1) {
        multiply<T, 2, PANELS>(x, w, k_size, row, tile);
        row += 2;
        continue;
      }
    }
    multiply<T, 1, PANELS>(x, w, k_size, row, tile);
    row += 1;
  }
}

// x * sigmoid(scale * x)
inline Vec swish(Vec x, Vec scaled) { return x / (Vec::set(1.0f) + exp(Vec::zero() - scaled)); }

inline Vec gated(Gate gate, Vec x) {
  if (gate == Gate::Silu) return swish(x, x);
  // gelu by tanh: 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  const Vec cubic = fma(x * x * x, Vec::set(0.044715f), x);
  return swish(x, cubic * Vec::set(1.5957691216057308f));
}

template <typename T>
void finish(const PackedLinearParams& p, int64_t panel, const float (*sum)[kPanel], const float (*up)[kPanel],
            int64_t row_begin, int rows) {
  const int64_t column = panel * kPanel;
  const T* bias = static_cast<const T*>(p.bias);
  if (bias) bias += (up ? 2 : 1) * column;
  for (int r = 0; r < rows; ++r) {
    T* out = static_cast<T*>(p.out) + (row_begin + r) * p.out_features + column;
    const T* residual = static_cast<const T*>(p.residual);
    if (residual) residual += (row_begin + r) * p.residual_stride + column;
    for (int c = 0; c < kPanel; c += Vec::N) {
      const int64_t remaining = p.out_features - column - c;
      if (remaining <= 0) break;
      const int n = remaining < Vec::N ? static_cast<int>(remaining) : Vec::N;
      Vec y = Vec::load(sum[r] + c);
      if (bias) y = y + Vec::load(bias + c);
      if (up) {
        Vec z = Vec::load(up[r] + c);
        if (bias) z = z + Vec::load(bias + kPanel + c);
        y = gated(p.gate, y) * z;
      }
      if (residual) y = y + (n == Vec::N ? Vec::load(residual + c) : Vec::load_n(residual + c, n));
      if (n == Vec::N) y.store(out + c);
      else y.store_n(out + c, n);
    }
  }
}

template <typename T, int PANELS>
void panels(const PackedLinearParams& p, int64_t panel, int64_t row_begin, int64_t row_end) {
  const T* w = static_cast<const T*>(p.weight) + panel * p.in_features * kPanel;
  const bool paired = p.gate != Gate::None;
  Tile tile;
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int rows = static_cast<int>(row_end - row < kRowBlock ? row_end - row : kRowBlock);
    const PackedX<T>* x = static_cast<const PackedX<T>*>(p.packed_x) + row * p.in_features;
    block<T, PANELS>(x, w, p.in_features, rows, tile);
    if (paired) {
      for (int c = 0; c < PANELS; c += 2) finish<T>(p, (panel + c) / 2, tile.v[c], tile.v[c + 1], row, rows);
    } else {
      for (int c = 0; c < PANELS; ++c) finish<T>(p, panel + c, tile.v[c], nullptr, row, rows);
    }
  }
}

// Computes gate and up in separate register tiles, for many rows: each takes 16 rows and reads x from cache once.
template <typename T>
void gate_up(const PackedLinearParams& p, int64_t panel, int64_t row_begin, int64_t row_end) {
  const T* w = static_cast<const T*>(p.weight) + panel * p.in_features * kPanel;
  Tile gate, up;
  for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
    const int rows = static_cast<int>(row_end - row < kRowBlock ? row_end - row : kRowBlock);
    const PackedX<T>* x = static_cast<const PackedX<T>*>(p.packed_x) + row * p.in_features;
    block<T, 1>(x, w, p.in_features, rows, gate);
    block<T, 1>(x, w + p.in_features * kPanel, p.in_features, rows, up);
    finish<T>(p, panel / 2, gate.v[0], up.v[0], row, rows);
  }
}

#if defined(TD_ISA_AMX_BF16)
constexpr int64_t kTileK = 32;  // of a tile register: 16 rows of 64 bytes

bool fits_tiles(const PackedLinearParams& p) { return p.dtype == DType::BF16 && p.in_features % kTileK == 0; }

// Computes panels [begin, end), gates and ups counted one by one. The order of sums over k does not depend on the rows.
void run_tiles(const PackedLinearParams& p, int64_t begin, int64_t end) {
  const bool paired = p.gate != Gate::None;
  const int64_t units = p.in_features / 2;
  const auto* weight = static_cast<const float*>(p.weight);    // [units, 16] pairs of a panel, one after another
  const auto* packed = static_cast<const float*>(p.packed_x);  // [rows, units] pairs
  Tile sums[2];
  const Tiles tiles;
  for (int64_t pass = 0; pass < p.num_rows; pass += kRowsPerPass) {
    const int64_t pass_end = pass + kRowsPerPass < p.num_rows ? pass + kRowsPerPass : p.num_rows;
    for (int64_t panel = begin; panel < end; panel += 2) {
      const bool two_panels = panel + 2 <= end;
      const float* w = weight + panel * units * kPanel;
      for (int64_t row = pass; row < pass_end; row += 2 * kRowBlock) {
        const bool two_blocks = pass_end - row > kRowBlock;
        const TileProduct product{
            .a = packed + row * units,
            .a_stride = units,
            .b = w,
            .b_stride = kPanel,
            .b_right = units * kPanel,
            .depth = units,
            .c = sums[0].v[0][0],
            .c_stride = kPanel,
            .c_right = kRowBlock * kPanel,
            .c_below = sizeof(Tile) / sizeof(float),
        };
        if (two_panels && two_blocks) multiply_tiles<2, 2>(product, false);
        else if (two_panels) multiply_tiles<1, 2>(product, false);
        else if (two_blocks) multiply_tiles<2, 1>(product, false);
        else multiply_tiles<1, 1>(product, false);
        for (int block = 0; block < 1 + two_blocks; ++block) {
          const int64_t first = row + block * kRowBlock;
          const int rows = static_cast<int>(pass_end - first < kRowBlock ? pass_end - first : kRowBlock);
          const Tile& sum = sums[block];
          if (paired) {
            finish<bf16>(p, panel / 2, sum.v[0], sum.v[1], first, rows);
          } else {
            for (int c = 0; c < 1 + two_panels; ++c) finish<bf16>(p, panel + c, sum.v[c], nullptr, first, rows);
          }
        }
      }
    }
  }
}

// Packs row blocks of [16, in_features] bf16; rows beyond the last one are zeros.
void pack_tiles(const PackedLinearParams& p, int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(p.in_features) * sizeof(bf16);
  for (int64_t row = begin * kRowBlock; row < end * kRowBlock; ++row) {
    bf16* out = static_cast<bf16*>(p.packed_x) + row * p.in_features;
    if (row < p.num_rows) std::memcpy(out, static_cast<const bf16*>(p.x) + row * p.x_stride, row_bytes);
    else std::memset(out, 0, row_bytes);
  }
}
#endif

template <typename T>
void run(const PackedLinearParams& p, int64_t begin, int64_t end) {
  const bool paired = p.gate != Gate::None;
  if (paired) begin *= 2, end *= 2;
  for (int64_t row = 0; row < p.num_rows; row += kRowsPerPass) {
    const int64_t row_end = row + kRowsPerPass < p.num_rows ? row + kRowsPerPass : p.num_rows;
    int64_t panel = begin;
    // Few rows leave registers free: several panels at once keep enough multiplications in flight.
    if (p.num_rows <= 4) {
      for (; panel + 4 <= end; panel += 4) panels<T, 4>(p, panel, row, row_end);
    }
    if (p.num_rows <= 8 && kVecs == 1) {
      for (; panel + 2 <= end; panel += 2) panels<T, 2>(p, panel, row, row_end);
    }
    if (paired) {
      for (; panel < end; panel += 2) gate_up<T>(p, panel, row, row_end);
    }
    for (; panel < end; ++panel) panels<T, 1>(p, panel, row, row_end);
  }
}

template <typename T>
void pack(const PackedLinearParams& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row_begin = b * kRowBlock;
    const int64_t rows = p.num_rows - row_begin < kRowBlock ? p.num_rows - row_begin : kRowBlock;
    const T* x = static_cast<const T*>(p.x) + row_begin * p.x_stride;
    if constexpr (kBf16Dot && std::is_same_v<T, bf16>) {
      int32_t* out = static_cast<int32_t*>(p.packed_x) + row_begin * p.in_features / 2;
      for (int64_t r = 0; r < kRowBlock; ++r) {
        for (int64_t k = 0; k < p.in_features / 2; ++k) {
          int32_t pair = 0;
          if (r < rows) std::memcpy(&pair, x + r * p.x_stride + 2 * k, 4);
          out[k * kRowBlock + r] = pair;
        }
      }
    } else {
      float* out = static_cast<float*>(p.packed_x) + row_begin * p.in_features;
      for (int64_t r = 0; r < kRowBlock; ++r) {
        for (int64_t k = 0; k < p.in_features; ++k)
          out[k * kRowBlock + r] = r < rows ? to_float(x[r * p.x_stride + k]) : 0.0f;
      }
    }
  }
}

}  // namespace

void pack_rows(const PackedLinearParams& p, int64_t begin, int64_t end) {
#if defined(TD_ISA_AMX_BF16)
  if (fits_tiles(p)) return pack_tiles(p, begin, end);
#endif
  switch (p.dtype) {
    case DType::F32: return pack<float>(p, begin, end);
    case DType::BF16: return pack<bf16>(p, begin, end);
    case DType::F16: return pack<fp16>(p, begin, end);
  }
}

void packed_linear(const PackedLinearParams& p, int64_t begin, int64_t end) {
#if defined(TD_ISA_AMX_BF16)
  if (fits_tiles(p)) {
    const int64_t panels = p.gate == Gate::None ? 1 : 2;
    return run_tiles(p, panels * begin, panels * end);
  }
#endif
  switch (p.dtype) {
    case DType::F32: return run<float>(p, begin, end);
    case DType::BF16: return run<bf16>(p, begin, end);
    case DType::F16: return run<fp16>(p, begin, end);
  }
}

}  // namespace treedecode::cpu::TD_ISA
