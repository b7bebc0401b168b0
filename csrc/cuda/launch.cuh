// Starting kernels: the same launcher code for the device and for the tests' host shim.
#pragma once

#include <cstddef>
#include <cstdint>
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

inline cudaError_t num_multiprocessors(int* count) {
  *count = 2;
  return cudaSuccess;
}

#else

// Blocks are one-dimensional. Takes no more than what the arguments say, so it can be captured.
template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), Grid grid, int num_threads, size_t shared_bytes, cudaStream_t stream,
                   std::type_identity_t<Args>... args) {
  if (shared_bytes > (48 << 10)) {  // more than every device has must be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline cudaError_t num_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

#endif

}  // namespace treedecode::cuda
