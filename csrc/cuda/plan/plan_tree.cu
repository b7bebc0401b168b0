#include "plan_tree.cuh"

#include "../common/launch.cuh"

namespace treedecode::cuda {

cudaError_t plan_tree(const PlanTreeParams& p, cudaStream_t stream) {
  if (p.num_rows > 0) {
    const auto num_rows = static_cast<uint32_t>(p.num_rows);
    cudaError_t error = launch(&_hash_pages_kernel, {num_rows}, kOrderThreads, 0, stream, p);
    if (error == cudaSuccess) error = launch_dependent(&_order_rows_kernel, {num_rows}, kOrderThreads, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  const int64_t num_compared = std::max<int64_t>(0, p.num_rows - 1) * num_page_segments(p.max_pages);
  if (num_compared > 0) {
    const cudaError_t error =
        launch_dependent(&_compare_pages_kernel, {static_cast<uint32_t>(num_compared)}, kCompareThreads, 0, stream, p);
    if (error != cudaSuccess) return error;
  }
  const size_t shared_bytes = p.num_rows > kSharedRows ? 0 : 4 * static_cast<size_t>(tree_words(p.num_rows));
  // A thread for each node, up to a full block. No more, because every warp makes barriers and scans slower.
  const int64_t nodes = (2 * p.num_rows + ptx::kWarpSize - 1) / ptx::kWarpSize * ptx::kWarpSize;
  const auto threads = static_cast<int>(std::clamp<int64_t>(nodes, ptx::kWarpSize, kMaxPlanThreads));
  return launch_dependent(&_plan_tree_kernel, {1}, threads, shared_bytes, stream, p);
}

}  // namespace treedecode::cuda
