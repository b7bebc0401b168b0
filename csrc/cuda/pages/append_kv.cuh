#pragma once

#include "../common/vector.cuh"
#include "append_kv.h"

namespace treedecode::cuda {

inline constexpr int kAppendKvThreads = 256;

// Each block copies `tokens_per_block` tokens; each thread copies a word of K and the same word of V.
template <int kBytes>
__global__ void __launch_bounds__(kAppendKvThreads)
    _append_kv_kernel(const __grid_constant__ AppendKvParams p, int tokens_per_block) {
  ptx::launch_next_kernel();  // attention, which waits for the new K and V
  using W = Word<kBytes>;
  const int words_per_head = static_cast<int>(p.head_bytes / kBytes);
  const int words_per_token = static_cast<int>(p.num_kv_heads) * words_per_head;
  const int64_t first = static_cast<int64_t>(ptx::block_x()) * tokens_per_block;
  for (int i = ptx::thread(); i < tokens_per_block * words_per_token; i += kAppendKvThreads) {
    const int64_t token = first + i / words_per_token;
    if (token >= p.num_tokens) return;
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) continue;
    const int word = i % words_per_token, head = word / words_per_head;
    const int64_t begin = static_cast<int64_t>(word % words_per_head) * kBytes;
    const int64_t page = p.num_slots <= UINT32_MAX  // a 64-bit division is a hundred instructions
                             ? static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.page_size)
                             : slot / p.page_size;
    const int64_t offset = slot - page * p.page_size;
    const auto word_at = [](auto* base, int64_t bytes) {
      using Char = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const char, char>;
      using Target = std::conditional_t<std::is_const_v<Char>, const W, W>;
      return reinterpret_cast<Target*>(static_cast<Char*>(base) + bytes);
    };
    const W k = *word_at(p.k, token * p.k_stride.token + head * p.k_stride.head + begin);
    const W v = *word_at(p.v, token * p.v_stride.token + head * p.v_stride.head + begin);
    *word_at(p.k_pages,
             page * p.k_page_stride.page + offset * p.k_page_stride.token + head * p.k_page_stride.head + begin) = k;
    *word_at(p.v_pages,
             page * p.v_page_stride.page + offset * p.v_page_stride.token + head * p.v_page_stride.head + begin) = v;
  }
}

}  // namespace treedecode::cuda
