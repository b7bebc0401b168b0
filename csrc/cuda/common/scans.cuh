// Several scans of a block in one pass.
#pragma once

#include "collectives.cuh"

namespace treedecode::cuda {

// Scans kNum values of each thread, with the barriers and the latency of one scan: `values` become the sums of the
// threads before. Returns the sums of all threads, in shared memory that is valid until the next such scan.
template <typename T, int kNum>
__device__ const T* block_scans(T (&values)[kNum]) {
  TD_SHARED(T, sums, kNum * ptx::kWarpSize);
  TD_SHARED(T, all, kNum);
  const int lane = ptx::lane(), num_warps = ptx::num_threads() / ptx::kWarpSize;
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
    const T sum = lane < num_warps ? of_lane : T{}, inclusive = warp_scan(sum);
    of_lane = inclusive - sum;
    if (lane == ptx::kWarpSize - 1) all[i] = inclusive;
  }
  ptx::sync_threads();
#pragma unroll
  for (int i = 0; i < kNum; ++i) values[i] += sums[i * ptx::kWarpSize + ptx::warp()];
  return all;
}

}  // namespace treedecode::cuda
