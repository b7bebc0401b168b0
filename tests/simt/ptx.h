// The names of csrc/cuda/common/ptx.cuh for the host, on top of simt.h.
#pragma once

#include <bit>
#include <cmath>

#include "simt.h"
#include "traffic.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define TD_SHARED(type, name, count) \
  static const char name##_key = 0;  \
  auto& name = *static_cast<type(*)[count]>(simt::shared_array(&name##_key, sizeof(type[count])))

namespace treedecode::cuda::ptx {

using Site = simt::Site;

inline int thread() { return simt::position().thread; }
inline int num_threads() { return simt::position().num_threads; }
inline int lane() { return thread() % kWarpSize; }
inline int warp() { return thread() / kWarpSize; }
inline uint32_t block_x() { return simt::position().block[0]; }
inline uint32_t block_y() { return simt::position().block[1]; }
inline uint32_t block_z() { return simt::position().block[2]; }
inline uint32_t grid_x() { return simt::position().grid[0]; }
inline uint32_t grid_y() { return simt::position().grid[1]; }
inline uint32_t grid_z() { return simt::position().grid[2]; }

inline int opaque(int x) { return x; }

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}

inline void sync_threads(Site site = Site::current()) { simt::sync_threads(false, site); }
inline bool sync_threads_or(bool value, Site site = Site::current()) { return simt::sync_threads(value, site); }
inline void sync_warp(uint32_t mask = kAllLanes, Site site = Site::current()) {
  simt::exchange("sync_warp", mask, 0, site);
}
inline void named_barrier_sync(int id, int count, Site site = Site::current()) {
  simt::named_barrier(id, count, true, site);
}
inline void named_barrier_arrive(int id, int count, Site site = Site::current()) {
  simt::named_barrier(id, count, false, site);
}
inline void thread_fence() { simt::maybe_yield(); }
inline void back_off(Site site = Site::current()) { simt::back_off(site); }
inline void wait_for_previous_kernel() {}
inline void launch_next_kernel() {}

template <typename T>
T shfl(T value, int source_lane, uint32_t mask = kAllLanes, Site site = Site::current()) {
  const int from = source_lane % kWarpSize;
  if (!(mask >> from & 1)) simt::fail(site, "shfl from a lane that takes no part");
  return simt::exchange("shfl", mask, value, site).template get<T>(from);
}
template <typename T>
T shfl_up(T value, int delta, uint32_t mask = kAllLanes, Site site = Site::current()) {
  const int from = lane() < delta ? lane() : lane() - delta;
  if (!(mask >> from & 1)) simt::fail(site, "shfl_up from a lane that takes no part");
  return simt::exchange("shfl_up", mask, value, site).template get<T>(from);
}
template <typename T>
T shfl_down(T value, int delta, uint32_t mask = kAllLanes, Site site = Site::current()) {
  const int from = lane() + delta >= kWarpSize ? lane() : lane() + delta;
  if (!(mask >> from & 1)) simt::fail(site, "shfl_down from a lane that takes no part");
  return simt::exchange("shfl_down", mask, value, site).template get<T>(from);
}
template <typename T>
T shfl_xor(T value, int lane_mask, uint32_t mask = kAllLanes, Site site = Site::current()) {
  const int from = lane() ^ lane_mask;
  if (!(mask >> from & 1)) simt::fail(site, "shfl_xor from a lane that takes no part");
  return simt::exchange("shfl_xor", mask, value, site).template get<T>(from);
}

inline uint32_t votes(const char* name, bool value, uint32_t mask, const Site& site) {
  const simt::Exchange all = simt::exchange(name, mask, value, site);
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) bits |= static_cast<uint32_t>(all.get<bool>(i)) << i;
  }
  return bits;
}
inline uint32_t ballot(bool value, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return votes("ballot", value, mask, site);
}
inline bool any(bool value, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return votes("any", value, mask, site) != 0;
}
inline bool all(bool value, uint32_t mask = kAllLanes, Site site = Site::current()) {
  return votes("all", value, mask, site) == mask;
}

inline int popc(uint32_t x) { return std::popcount(x); }
inline int popc(uint64_t x) { return std::popcount(x); }
inline int lowest_bit(uint32_t x) { return x ? std::countr_zero(x) : -1; }
inline int clz(uint32_t x) { return std::countl_zero(x); }
inline int clz(uint64_t x) { return std::countl_zero(x); }
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }
inline void opaque(uint32_t&) {}

template <typename T, typename F>
T atomic_update(T* p, F update) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  simt::maybe_yield();
  const T old = *p;
  *p = update(old);
  return old;
}
template <typename T>
T atomic_add(T* p, std::type_identity_t<T> value) {
  using U = std::make_unsigned_t<T>;
  return atomic_update(p, [&](T old) { return static_cast<T>(static_cast<U>(old) + static_cast<U>(value)); });
}
template <typename T>
T atomic_max(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomic_min(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomic_exch(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T) { return value; });
}
template <typename T>
T atomic_cas(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomic_update(p, [&](T old) { return old == expected ? value : old; });
}

inline Bytes16 load_once(const Bytes16* p, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail(site, "load_once of a misaligned address");
  return *p;
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid = true, Site site = Site::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::copy_later(shared, global, kBytes, valid, site);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simt::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool trans, const Site& site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail(site, "ldmatrix of a misaligned row");
  const simt::Exchange rows = simt::exchange("ldmatrix", kAllLanes, row, site);
  if (lane() % 8 == 0) {
    const void* of_matrix[8];
    for (int i = 0; i < 8; ++i) of_matrix[i] = rows.get<const void*>(lane() + i);
    simt::note_matrix(of_matrix);
  }
  const auto element = [&](int matrix, int i, int j) {
    return static_cast<uint32_t>(rows.get<const uint16_t*>(matrix * 8 + i)[j]);
  };
  const int group = lane() / 4, member = lane() % 4;
  for (int m = 0; m < 4; ++m) {
    r[m] = trans ? element(m, 2 * member, group) | element(m, 2 * member + 1, group) << 16
                 : element(m, group, 2 * member) | element(m, group, 2 * member + 1) << 16;
  }
  // All lanes read before any returns, because rows may be overwritten as soon as this returns.
  simt::exchange("ldmatrix, read", kAllLanes, 0, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  load_matrices(r, row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  load_matrices(r, row, true, site);
}

template <typename T>
Pair unpack(uint32_t r) {
  return {to_float(T{static_cast<uint16_t>(r)}), to_float(T{static_cast<uint16_t>(r >> 16)})};
}
template <typename T>
uint32_t pack(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}
using treedecode::from_float;
using treedecode::to_float;

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const simt::Exchange lanes =
      simt::exchange("mma", kAllLanes, Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, site);
  const auto half = [](uint32_t r, int i) { return i ? unpack<T>(r).hi : unpack<T>(r).lo; };
  // PTX ISA: rows of a lane are lane / 4 and 8 more, columns 2 * (lane % 4) and one more, and 8 more in later
  // registers.
  const auto a_at = [&](int i, int k) {
    return half(lanes.get<Fragments>(i % 8 * 4 + k % 8 / 2).a[i / 8 + k / 8 * 2], k % 2);
  };
  const auto b_at = [&](int k, int j) { return half(lanes.get<Fragments>(j * 4 + k % 8 / 2).b[k / 8], k % 2); };
  for (int e = 0; e < 4; ++e) {
    const int i = lane() / 4 + e / 2 * 8, j = lane() % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) d[e] += a_at(i, k) * b_at(k, j);
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rcp_approx(float x) { return 1.0f / x; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace treedecode::cuda::ptx
