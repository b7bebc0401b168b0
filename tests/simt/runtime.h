// Names of the CUDA runtime that launchers use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace simt {
cudaError_t run(uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, int num_threads, size_t shared_bytes,
                const std::function<void()>& kernel);
}
