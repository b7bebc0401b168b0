#pragma once

#include "../common/launch.cuh"
#include "kernels.h"
#include "mma.cuh"

namespace treedecode::cuda {

template <typename T, int kDim>
cudaError_t launch_attention_mma(const TreeAttentionParams& p, cudaStream_t stream) {
  return launch_persistent(&_tree_attention_mma_kernel<T, kDim>, kAttentionThreads, mma_shared_bytes<kDim>(), stream,
                           p);
}

}  // namespace treedecode::cuda
