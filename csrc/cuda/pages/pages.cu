#include "pages.cuh"

#include <algorithm>

#include "../common/launch.cuh"

namespace treedecode::cuda {
namespace {

// Returns the threads for n items of `per_item` threads each, up to a full block. No more, because every warp makes
// barriers slower.
int threads_for(int64_t n, int per_item) {
  const int64_t wanted = (n * per_item + ptx::kWarpSize - 1) / ptx::kWarpSize * ptx::kWarpSize;
  return static_cast<int>(std::clamp<int64_t>(wanted, ptx::kWarpSize, kMaxPageThreads));
}

}  // namespace

cudaError_t fork_branches(const ForkParams& p, cudaStream_t stream) {
  return launch(&_fork_branches_kernel, {}, threads_for(p.n, ptx::kWarpSize), 0, stream, p);
}

cudaError_t append_slots(const AppendParams& p, cudaStream_t stream) {
  return launch(&_append_slots_kernel, {}, threads_for(p.n, ptx::kWarpSize), 0, stream, p);
}

cudaError_t hold_pages(const HoldParams& p, cudaStream_t stream) {
  return launch(&_hold_pages_kernel, {}, threads_for(p.n, 1), 0, stream, p);
}

cudaError_t adopt_pages(const AdoptParams& p, cudaStream_t stream) {
  return launch(&_adopt_pages_kernel, {}, threads_for(p.n, 1), 0, stream, p);
}

}  // namespace treedecode::cuda
