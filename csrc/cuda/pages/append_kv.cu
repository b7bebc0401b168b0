#include "append_kv.cuh"

#include <algorithm>

#include "../common/launch.cuh"

namespace treedecode::cuda {

cudaError_t append_kv(const AppendKvParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_kv_heads == 0 || p.head_bytes == 0) return cudaSuccess;
  uint64_t bits = static_cast<uint64_t>(p.head_bytes);
  for (const void* address : {p.k, p.v, static_cast<const void*>(p.k_pages), static_cast<const void*>(p.v_pages)}) {
    bits |= reinterpret_cast<uintptr_t>(address);
  }
  for (const TokenStride& s : {p.k_stride, p.v_stride}) bits |= static_cast<uint64_t>(s.token | s.head);
  for (const PageStride& s : {p.k_page_stride, p.v_page_stride}) {
    bits |= static_cast<uint64_t>(s.page | s.token | s.head);
  }
  return with_word_size(bits, [&](auto bytes) {
    const int64_t words = p.num_kv_heads * p.head_bytes / bytes;
    const int64_t tokens_per_block = std::clamp<int64_t>(kAppendKvThreads / words, 1, p.num_tokens);
    const int64_t num_blocks = (p.num_tokens + tokens_per_block - 1) / tokens_per_block;
    return launch(&_append_kv_kernel<bytes>, {static_cast<uint32_t>(num_blocks)}, kAppendKvThreads, 0, stream, p,
                  static_cast<int>(tokens_per_block));
  });
}

}  // namespace treedecode::cuda
