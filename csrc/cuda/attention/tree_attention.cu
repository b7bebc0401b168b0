#include "tree_attention.h"

#include "../common/launch.cuh"
#include "kernels.h"
#include "merge.cuh"
#include "simt.cuh"

namespace treedecode::cuda {
namespace {

// True if all rows of q, K and V begin at multiples of 16 bytes.
bool is_aligned(const TreeAttentionParams& p) {
  uint64_t bytes = 0, elements = 0;
  for (const void* address : {p.q, p.k_pages, p.v_pages}) bytes |= reinterpret_cast<uintptr_t>(address);
  elements |= static_cast<uint64_t>(p.q_stride.token | p.q_stride.head);
  for (const PageStride& s : {p.k_stride, p.v_stride}) elements |= static_cast<uint64_t>(s.page | s.token | s.head);
  return bytes % 16 == 0 && elements % 8 == 0;
}

template <typename T>
cudaError_t attend(const TreeAttentionParams& p, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (is_aligned(p)) {
#define TD_LAUNCH(T, kDim) \
  if (p.head_dim <= kDim) return launch_attention_mma<T, kDim>(p, stream);
      TD_FOR_MMA_HEAD_DIMS(TD_LAUNCH, T)
#undef TD_LAUNCH
    }
  }
  return launch_persistent(&_tree_attention_simt_kernel<T>, kAttentionThreads,
                           static_cast<size_t>(simt_shared_bytes(p.head_dim)), stream, p);
}

template <typename T>
cudaError_t attend_and_merge(const TreeAttentionParams& p, cudaStream_t stream) {
  if (p.num_q == 0) return cudaSuccess;
  if (const cudaError_t error = attend<T>(p, stream); error != cudaSuccess) return error;
  constexpr int64_t kWarps = kAttentionThreads / ptx::kWarpSize;
  const int64_t num_blocks = (p.num_q * p.num_qo_heads + kWarps - 1) / kWarps;
  const auto merge =
      p.head_dim <= kQuadDims ? &_tree_attention_merge_kernel<T, 1> : &_tree_attention_merge_kernel<T, 2>;
  return launch_dependent(merge, {static_cast<uint32_t>(num_blocks)}, kAttentionThreads, 0, stream, p);
}

}  // namespace

cudaError_t tree_attention(const TreeAttentionParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::F32: return attend_and_merge<float>(p, stream);
    case DType::BF16: return attend_and_merge<bf16>(p, stream);
    case DType::F16: return attend_and_merge<fp16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace treedecode::cuda
