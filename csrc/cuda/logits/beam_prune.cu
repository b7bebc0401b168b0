#include "beam_prune.cuh"

#include "../common/launch.cuh"

namespace treedecode::cuda {

int64_t beam_prune_sort_len(int64_t num_keys) { return num_keys <= kSharedKeys ? 0 : power_of_two(num_keys); }

cudaError_t beam_prune(const BeamPruneParams& p, cudaStream_t stream) {
  const LogitsParams& l = p.logits;
  if (l.rows == 0 && p.num_groups == 0) return cudaSuccess;
  // Without rows one block still fills the outputs of the empty groups.
  const Grid grid{static_cast<uint32_t>(std::max<int64_t>(1, l.rows * l.num_chunks))};
  const auto scan = l.dtype == DType::F32    ? &_beam_prune_scan_kernel<float>
                    : l.dtype == DType::BF16 ? &_beam_prune_scan_kernel<bf16>
                                             : &_beam_prune_scan_kernel<fp16>;
  const cudaError_t error = launch(scan, grid, kLogitsThreads, 0, stream, p);
  if (error != cudaSuccess || l.rows == 0) return error;
  return launch_dependent(&_beam_prune_merge_kernel, {static_cast<uint32_t>(l.rows)}, kLogitsThreads, 0, stream, p);
}

}  // namespace treedecode::cuda
