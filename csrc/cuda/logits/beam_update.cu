#include "beam_update.cuh"

#include "../common/launch.cuh"

namespace treedecode::cuda {

cudaError_t beam_update(const BeamUpdateParams& p, cudaStream_t stream) {
  if (p.num_groups == 0) return cudaSuccess;
  return launch(&_beam_update_kernel, {static_cast<uint32_t>(p.num_groups)}, kBeamUpdateThreads, 0, stream, p);
}

}  // namespace treedecode::cuda
