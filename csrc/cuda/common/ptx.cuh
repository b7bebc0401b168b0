// The only file with inline PTX and CUDA intrinsics. Kernels use these names, so that the tests can run the same source
// on the host: with TREEDECODE_SIMT they come from tests/simt/ptx.h, which checks how they are used.
//
// Warp collectives take the mask of the lanes that take part, all 32 unless given; those lanes must call together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../cpu/dtypes.h"

namespace treedecode::cuda::ptx {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

struct alignas(8) Bytes8 {
  uint32_t word[2];
};

struct alignas(8) Pair {
  float lo;
  float hi;
};

}  // namespace treedecode::cuda::ptx

#ifdef TREEDECODE_SIMT
#include "simt/ptx.h"
#else

#include <cuda_runtime.h>

// An array in the block's shared memory, uninitialised, aligned for vector accesses.
#define TD_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace treedecode::cuda::ptx {

// Indices of the thread, its warp and its block.

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int num_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int lane() { return thread() % kWarpSize; }  // blocks are one-dimensional
__device__ __forceinline__ int warp() { return thread() / kWarpSize; }
__device__ __forceinline__ uint32_t block_x() { return blockIdx.x; }
__device__ __forceinline__ uint32_t block_y() { return blockIdx.y; }
__device__ __forceinline__ uint32_t block_z() { return blockIdx.z; }
__device__ __forceinline__ uint32_t grid_x() { return gridDim.x; }
__device__ __forceinline__ uint32_t grid_y() { return gridDim.y; }
__device__ __forceinline__ uint32_t grid_z() { return gridDim.z; }

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char td_dynamic_shared[];
  return reinterpret_cast<T*>(td_dynamic_shared);
}

// Returns x, which the compiler takes for a new value: it computes again what it needs of x, instead of keeping that in
// registers from before a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Barriers.

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ bool sync_threads_or(bool value) { return __syncthreads_or(value) != 0; }
__device__ __forceinline__ void sync_warp(uint32_t mask = kAllLanes) { __syncwarp(mask); }

// Barriers `id` of 1 .. 15, for `count` threads (a multiple of 32) of whole warps.
__device__ __forceinline__ void named_barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Makes earlier writes of this thread visible to the device before its later ones.
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// Waits a moment, in a loop that polls memory which another block writes; that is read with an atomic or as volatile.
__device__ __forceinline__ void back_off() { __nanosleep(32); }

// Programmatic dependent launch: waits for the kernels before this one in the stream; lets the next one start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Warp collectives.

template <typename T>
__device__ __forceinline__ T shfl(T value, int source_lane, uint32_t mask = kAllLanes) {
  return __shfl_sync(mask, value, source_lane);
}
// Returns the value of the lane `delta` below; lanes without such a lane keep their own.
template <typename T>
__device__ __forceinline__ T shfl_up(T value, int delta, uint32_t mask = kAllLanes) {
  return __shfl_up_sync(mask, value, delta);
}
template <typename T>
__device__ __forceinline__ T shfl_down(T value, int delta, uint32_t mask = kAllLanes) {
  return __shfl_down_sync(mask, value, delta);
}
template <typename T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask, uint32_t mask = kAllLanes) {
  return __shfl_xor_sync(mask, value, lane_mask);
}
__device__ __forceinline__ uint32_t ballot(bool value, uint32_t mask = kAllLanes) { return __ballot_sync(mask, value); }
__device__ __forceinline__ bool any(bool value, uint32_t mask = kAllLanes) { return __any_sync(mask, value) != 0; }
__device__ __forceinline__ bool all(bool value, uint32_t mask = kAllLanes) { return __all_sync(mask, value) != 0; }

// Bits.

__device__ __forceinline__ int popc(uint32_t x) { return __popc(x); }
__device__ __forceinline__ int popc(uint64_t x) { return __popcll(x); }
// Index of the lowest set bit, -1 for 0.
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
__device__ __forceinline__ int clz(uint32_t x) { return __clz(static_cast<int>(x)); }
__device__ __forceinline__ int clz(uint64_t x) { return __clzll(static_cast<long long>(x)); }
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }
// Makes the compiler take x for a new value, so that it does not keep in registers what it has computed from the old
// one.
__device__ __forceinline__ void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }

// Atomics on integers, in global or shared memory, relaxed; they return the old value.

template <typename T>
using AtomicType = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;

template <typename T>
__device__ __forceinline__ T atomic_add(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "a sum of floats would depend on the order");
  return static_cast<T>(atomicAdd(reinterpret_cast<AtomicType<T>*>(p), static_cast<AtomicType<T>>(value)));
}
template <typename T>
__device__ __forceinline__ T atomic_max(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || std::is_unsigned_v<T>));
  return static_cast<T>(atomicMax(reinterpret_cast<AtomicType<T>*>(p), static_cast<AtomicType<T>>(value)));
}
template <typename T>
__device__ __forceinline__ T atomic_min(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || std::is_unsigned_v<T>));
  return static_cast<T>(atomicMin(reinterpret_cast<AtomicType<T>*>(p), static_cast<AtomicType<T>>(value)));
}
template <typename T>
__device__ __forceinline__ T atomic_exch(T* p, std::type_identity_t<T> value) {
  return static_cast<T>(atomicExch(reinterpret_cast<AtomicType<T>*>(p), static_cast<AtomicType<T>>(value)));
}
template <typename T>
__device__ __forceinline__ T atomic_cas(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  using A = AtomicType<T>;
  return static_cast<T>(atomicCAS(reinterpret_cast<A*>(p), static_cast<A>(expected), static_cast<A>(value)));
}

// Global memory.

// Loads 16 aligned bytes that nothing writes while the kernel runs, and that are read once.
__device__ __forceinline__ Bytes16 load_once(const Bytes16* p) {
  Bytes16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

// Asynchronous copies from global to shared memory.

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes, 4, 8 or 16, aligned to that. Writes zeros, and does not access `global`, if not `valid`.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(size)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread are in flight. Those of other threads need a barrier as well.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Matrix fragments.

// Loads four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], products of T summed in fp32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Arithmetic.

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Packs two values as T in a register, `lo` in the lower half; rounds to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  uint32_t r;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <typename T>
__device__ __forceinline__ Pair unpack(uint32_t r) {
  return {to_float(T{static_cast<uint16_t>(r)}), to_float(T{static_cast<uint16_t>(r >> 16)})};
}
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
}

}  // namespace treedecode::cuda::ptx

#endif
