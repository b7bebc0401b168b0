#pragma once

#include "../common/vector.cuh"
#include "copy_pages.h"

namespace treedecode::cuda {

inline constexpr int kCopyPagesThreads = 256;

// A work item is one copy in one plane, plane-major. A block takes one item at a time.
template <int kBytes>
__global__ void __launch_bounds__(kCopyPagesThreads) _copy_pages_kernel(const __grid_constant__ CopyPagesParams p) {
  ptx::wait_for_previous_kernel();  // append_slots, which lists the copies, or the kernel that wrote the pages
  using W = Word<kBytes>;
  constexpr int kUnroll = 4;  // loads in flight in each thread
  const int64_t num_copies = p.num_copies ? *p.num_copies : p.n;
  for (int64_t item = ptx::block_x(); item < p.num_planes * num_copies; item += ptx::grid_x()) {
    const int64_t plane = item / num_copies, i = item - plane * num_copies;
    const int32_t src = p.src[i], dst = p.dst[i];
    const int64_t num_tokens = p.num_tokens ? p.num_tokens[i] : p.page_size;
    if (dst < 0 || dst >= p.num_pages || src < 0 || src >= p.num_pages) continue;
    if (num_tokens < 0 || num_tokens > p.page_size) continue;
    char* base = p.kv + plane / 2 * p.stride_bytes.layer + plane % 2 * p.stride_bytes.kv;
    const W* from = reinterpret_cast<const W*>(base + src * p.stride_bytes.page);
    W* to = reinterpret_cast<W*>(base + dst * p.stride_bytes.page);
    const auto words_per_head = static_cast<uint32_t>(num_tokens * p.token_bytes / kBytes);
    const auto gap = static_cast<uint32_t>(p.head_bytes / kBytes) - words_per_head;
    const uint32_t num_words = words_per_head * static_cast<uint32_t>(p.num_kv_heads);
    for (uint32_t first = static_cast<uint32_t>(ptx::thread()); first < num_words;
         first += kUnroll * kCopyPagesThreads) {
      W words[kUnroll];
      uint32_t offsets[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t word = first + u * kCopyPagesThreads;
        offsets[u] = word + word / words_per_head * gap;
        if (word < num_words) words[u] = from[offsets[u]];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kCopyPagesThreads < num_words) to[offsets[u]] = words[u];
      }
    }
  }
}

}  // namespace treedecode::cuda
