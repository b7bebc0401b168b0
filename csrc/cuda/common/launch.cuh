// Starts kernels, on the device or on the tests' host shim, with the same launcher code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "runtime.h"

namespace treedecode::cuda {

struct Grid {
  uint32_t x = 1;
  uint32_t y = 1;
  uint32_t z = 1;
};

#ifdef TREEDECODE_SIMT

template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes, cudaStream_t,
                   std::type_identity_t<Args>... args) {
  return simt::run(grid.x, grid.y, grid.z, num_threads, shared_bytes, [&] { kernel(args...); });
}

template <typename... Args>
cudaError_t launch_dependent(void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes,
                             cudaStream_t stream, std::type_identity_t<Args>... args) {
  return launch(kernel, grid, num_threads, shared_bytes, stream, args...);
}

inline cudaError_t num_multiprocessors(int* count) {
  *count = 2;
  return cudaSuccess;
}

// Launches a grid whose blocks take items in turns: few blocks here, so that each of them takes a second item.
template <typename... Args>
cudaError_t launch_persistent(void (*kernel)(Args...), int num_threads, size_t shared_bytes, cudaStream_t stream,
                              std::type_identity_t<Args>... args) {
  return launch(kernel, {3}, num_threads, shared_bytes, stream, args...);
}

#else

namespace launch_detail {

template <typename... Args>
cudaError_t launch(bool dependent, void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Args>... args) {
  if (shared_bytes > (48 << 10)) {  // the driver grants more than this on request only
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace launch_detail

// Launches a kernel with one-dimensional blocks. Reads nothing but its arguments, so it can be captured.
template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes, cudaStream_t stream,
                   std::type_identity_t<Args>... args) {
  return launch_detail::launch(false, kernel, grid, num_threads, shared_bytes, stream, args...);
}

// Launches a kernel that may start while the one before it in the stream ends: it calls ptx::wait_for_previous_kernel
// before it reads or writes the memory that that one writes. Before sm_90 the same as launch.
template <typename... Args>
cudaError_t launch_dependent(void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes,
                             cudaStream_t stream, std::type_identity_t<Args>... args) {
  return launch_detail::launch(true, kernel, grid, num_threads, shared_bytes, stream, args...);
}

inline cudaError_t num_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Launches as many blocks as run at once; they take items in turns. Otherwise like launch_dependent.
template <typename... Args>
cudaError_t launch_persistent(void (*kernel)(Args...), int num_threads, size_t shared_bytes, cudaStream_t stream,
                              std::type_identity_t<Args>... args) {
  using BlockCounts = std::map<std::tuple<const void*, int, size_t>, int>;
  static std::mutex mutex;
  static BlockCounts block_counts;
  int device = 0, num_blocks = 0, per_multiprocessor = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::tuple key(reinterpret_cast<const void*>(kernel), device, shared_bytes);
  {
    const std::lock_guard lock(mutex);
    if (const auto entry = block_counts.find(key); entry != block_counts.end()) num_blocks = entry->second;
  }
  if (num_blocks == 0) {
    cudaError_t error = num_multiprocessors(&num_blocks);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, num_threads, shared_bytes);
    }
    if (error != cudaSuccess) return error;
    num_blocks *= per_multiprocessor > 0 ? per_multiprocessor : 1;
    const std::lock_guard lock(mutex);
    block_counts[key] = num_blocks;
  }
  return launch_dependent(kernel, {static_cast<uint32_t>(num_blocks)}, num_threads, shared_bytes, stream, args...);
}

#endif

}  // namespace treedecode::cuda
