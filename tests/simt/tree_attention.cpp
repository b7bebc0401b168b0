#include "../../csrc/cuda/attention/tree_attention.cu"
#include "../../csrc/cuda/attention/mma_launch.cuh"

#include "bind.h"

namespace treedecode::cuda {
#define TD_INSTANTIATE(T, kDim) \
  template cudaError_t launch_attention_mma<T, kDim>(const TreeAttentionParams& p, cudaStream_t stream);
TD_FOR_MMA_HEAD_DIMS(TD_INSTANTIATE, bf16)
TD_FOR_MMA_HEAD_DIMS(TD_INSTANTIATE, fp16)
#undef TD_INSTANTIATE
}  // namespace treedecode::cuda

SIMT_BIND(tree_attention, treedecode::cuda::TreeAttentionParams)
