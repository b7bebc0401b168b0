// Kernels that test the shim itself.
#pragma once

#include <cstdint>

#include "../../csrc/cuda/common/runtime.h"

namespace treedecode::cuda {

struct ToyParams {
  const int32_t* in;  // [num_threads]
  int32_t* out;       // [num_threads]
  int32_t num_threads;
  int32_t num_blocks;
};

struct FragmentParams {
  const uint16_t* a;   // [16, 16] row-major
  const uint16_t* b;   // [16, 8] row-major for mma and ldmatrix.trans
  float* out;          // [16, 8]
  uint32_t* elements;  // [32, 4] results of ldmatrix for a
  int32_t is_bf16;
};

cudaError_t toy_reverse(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_divergence(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_two_barriers(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_deadlock(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_early_exit(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_unwritten(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_cp_async(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_hand_over(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_last_block(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_poll(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_scan(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_scans(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_atomics(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_wide(const ToyParams& p, cudaStream_t stream);
cudaError_t toy_fragments(const FragmentParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
