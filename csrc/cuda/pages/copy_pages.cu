#include "copy_pages.cuh"

#include <algorithm>

#include "../common/launch.cuh"

namespace treedecode::cuda {

cudaError_t copy_pages(const CopyPagesParams& p, cudaStream_t stream) {
  if (p.n * p.num_planes * p.num_pages * p.num_kv_heads * p.head_bytes == 0) return cudaSuccess;
  int count = 0;
  if (const cudaError_t error = num_multiprocessors(&count); error != cudaSuccess) return error;
  // Enough blocks to fill the device; append_slots knows how many copies there are on the device only.
  const int64_t num_blocks = std::min<int64_t>(p.n * p.num_planes, 8 * count);
  uint64_t bits = reinterpret_cast<uintptr_t>(p.kv) | static_cast<uint64_t>(p.token_bytes | p.head_bytes);
  bits |= static_cast<uint64_t>(p.stride_bytes.layer | p.stride_bytes.kv | p.stride_bytes.page);
  return with_word_size(bits, [&](auto bytes) {
    return launch_dependent(&_copy_pages_kernel<bytes>, {static_cast<uint32_t>(num_blocks)}, kCopyPagesThreads, 0,
                            stream, p);
  });
}

}  // namespace treedecode::cuda
