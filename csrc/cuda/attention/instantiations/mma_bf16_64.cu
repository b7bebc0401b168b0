#include "../mma_launch.cuh"

namespace treedecode::cuda {
template cudaError_t launch_attention_mma<bf16, 64>(const TreeAttentionParams& p, cudaStream_t stream);
}
