// Tile registers (AMX): 16 rows of 64 bytes each, and products of 16 x 32 by 32 x 16 bf16 values.
#pragma once

#include <cstdint>

#include "vec.h"

#if defined(TD_ISA_AMX_BF16)
namespace treedecode::cpu::TD_ISA {

// Configures this thread's tile registers, all of the full size, for the lifetime of the object.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// One or two blocks of 16 rows of a, and of 16 lanes of b. Everything is counted in units of four bytes: pairs of bf16
// values in a and b, fp32 values in c.
struct TileProduct {
  const float* a;  // [rows, depth]
  int64_t a_stride;
  const float* b;  // [depth, 16], and the second block b_right units further
  int64_t b_stride, b_right;
  int64_t depth;  // a multiple of 16
  float* c;       // [16, 16], the second block of lanes c_right units further, that of rows c_below
  int64_t c_stride, c_right, c_below;
};

// Computes c[row][lane] (+)= sum_u a[row][u] * b[u][lane]. The sum of 16 units is rounded before it is added to c: a
// result depends on the grouping of units, and on no other rows or lanes.
template <int Rows, int Lanes>
static void multiply_tiles(const TileProduct& p, bool accumulate) {
  constexpr bool kBelow = Rows == 2, kRight = Lanes == 2;
  const int64_t a_bytes = p.a_stride * 4, b_bytes = p.b_stride * 4, c_bytes = p.c_stride * 4;
  if (accumulate) {
    _tile_loadd(0, p.c, c_bytes);
    if constexpr (kRight) _tile_loadd(1, p.c + p.c_right, c_bytes);
    if constexpr (kBelow) _tile_loadd(2, p.c + p.c_below, c_bytes);
    if constexpr (kBelow && kRight) _tile_loadd(3, p.c + p.c_below + p.c_right, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kRight) _tile_zero(1);
    if constexpr (kBelow) _tile_zero(2);
    if constexpr (kBelow && kRight) _tile_zero(3);
  }
  const float *a = p.a, *b = p.b;
  for (int64_t u = 0; u < p.depth; u += 16, a += 16, b += 16 * p.b_stride) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRight) {
      _tile_loadd(7, b + p.b_right, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kBelow) {
      _tile_loadd(5, a + 16 * p.a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kBelow && kRight) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.c, c_bytes);
  if constexpr (kRight) _tile_stored(1, p.c + p.c_right, c_bytes);
  if constexpr (kBelow) _tile_stored(2, p.c + p.c_below, c_bytes);
  if constexpr (kBelow && kRight) _tile_stored(3, p.c + p.c_below + p.c_right, c_bytes);
}

}  // namespace treedecode::cpu::TD_ISA
#endif
