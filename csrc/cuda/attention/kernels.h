// Instantiations of the tensor core kernel of tree_attention. Each has a file of its own, so that they compile in
// parallel.
#pragma once

#include "tree_attention.h"

namespace treedecode::cuda {

// Head dimensions with a kernel; others use that of the next larger one, with zeros.
#define TD_FOR_MMA_HEAD_DIMS(F, T) F(T, 64) F(T, 96) F(T, 128) F(T, 256)

template <typename T, int kDim>
cudaError_t launch_attention_mma(const TreeAttentionParams& p, cudaStream_t stream);

#define TD_DECLARE(T, kDim) \
  extern template cudaError_t launch_attention_mma<T, kDim>(const TreeAttentionParams& p, cudaStream_t stream);
TD_FOR_MMA_HEAD_DIMS(TD_DECLARE, bf16)
TD_FOR_MMA_HEAD_DIMS(TD_DECLARE, fp16)
#undef TD_DECLARE

}  // namespace treedecode::cuda
