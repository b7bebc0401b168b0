// Reductions and scans of a warp and of a block, built on ptx.cuh.
#pragma once

#include "ptx.cuh"

namespace treedecode::cuda {

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int delta = ptx::kWarpSize / 2; delta > 0; delta /= 2) value += ptx::shfl_xor(value, delta);
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int delta = ptx::kWarpSize / 2; delta > 0; delta /= 2) {
    const T other = ptx::shfl_xor(value, delta);
    value = other > value ? other : value;
  }
  return value;
}

// Returns the sum of the lanes up to this one, inclusive.
template <typename T>
__device__ __forceinline__ T warp_scan(T value) {
#pragma unroll
  for (int delta = 1; delta < ptx::kWarpSize; delta *= 2) {
    const T other = ptx::shfl_up(value, delta);
    if (ptx::lane() >= delta) value += other;
  }
  return value;
}

template <typename T>
struct BlockScan {
  T before;  // sum of the threads before this one
  T total;   // sum of all threads
};

// Scans the values of a block's threads. All of them call it, a multiple of 32.
template <typename T>
__device__ BlockScan<T> block_scan(T value) {
  TD_SHARED(T, sums, ptx::kWarpSize);
  const T inclusive = warp_scan(value);
  if (ptx::lane() == ptx::kWarpSize - 1) sums[ptx::warp()] = inclusive;
  ptx::sync_threads();
  const int num_warps = ptx::num_threads() / ptx::kWarpSize;
  const T sum = ptx::lane() < num_warps ? sums[ptx::lane()] : T{};
  const T warps = warp_scan(sum);
  const T before = ptx::shfl(warps - sum, ptx::warp());
  const T total = ptx::shfl(warps, ptx::kWarpSize - 1);
  ptx::sync_threads();  // the next scan writes sums
  return {before + inclusive - value, total};
}

}  // namespace treedecode::cuda
