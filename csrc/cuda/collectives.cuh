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

// Sum of the lanes up to and with this one.
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

// All threads of the block call it, a multiple of 32.
template <typename T>
__device__ BlockScan<T> block_scan(T value) {
  TD_SHARED(T, sums, ptx::kWarpSize);
  const T up_to_here = warp_scan(value);
  if (ptx::lane() == ptx::kWarpSize - 1) sums[ptx::warp()] = up_to_here;
  ptx::sync_threads();
  const int num_warps = ptx::num_threads() / ptx::kWarpSize;
  const T sum = ptx::lane() < num_warps ? sums[ptx::lane()] : T{};
  const T warps = warp_scan(sum);
  const T before = ptx::shfl(warps - sum, ptx::warp());
  const T total = ptx::shfl(warps, ptx::kWarpSize - 1);
  ptx::sync_threads();  // a following scan writes sums again
  return {before + up_to_here - value, total};
}

// Several scans at once, for the barriers and the latency of one: `values` become the sums of the threads before.
// Returns the sums of all threads, in shared memory up to the next such scan.
template <typename T, int kNum>
__device__ const T* block_scan(T (&values)[kNum]) {
  TD_SHARED(T, sums, kNum * ptx::kWarpSize);
  TD_SHARED(T, all, kNum);
  const int lane = ptx::lane(), num_warps = ptx::num_threads() / ptx::kWarpSize;
  ptx::sync_threads();  // what the scan before has left in shared memory is not needed any more
#pragma unroll
  for (int delta = 1; delta < ptx::kWarpSize; delta *= 2) {
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const T other = ptx::shfl_up(values[i], delta);
      if (lane >= delta) values[i] += other;
    }
  }
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    if (lane == ptx::kWarpSize - 1) sums[i * ptx::kWarpSize + ptx::warp()] = values[i];
    const T before = ptx::shfl_up(values[i], 1);
    values[i] = lane > 0 ? before : T{};
  }
  ptx::sync_threads();
  for (int i = ptx::warp(); i < kNum; i += num_warps) {
    T& of_lane = sums[i * ptx::kWarpSize + lane];
    const T sum = lane < num_warps ? of_lane : T{}, up_to_here = warp_scan(sum);
    of_lane = up_to_here - sum;
    if (lane == ptx::kWarpSize - 1) all[i] = up_to_here;
  }
  ptx::sync_threads();
#pragma unroll
  for (int i = 0; i < kNum; ++i) values[i] += sums[i * ptx::kWarpSize + ptx::warp()];
  return all;
}

}  // namespace treedecode::cuda
