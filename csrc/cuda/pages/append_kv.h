// append_kv on the device: writes K and V of new tokens into their cache slots.
#pragma once

#include <cstdint>

#include "../../cpu/strides.h"
#include "../common/runtime.h"

namespace treedecode::cuda {

struct AppendKvParams {
  const void* k;         // [num_tokens, num_kv_heads, head_dim], strides in k_stride
  const void* v;         // [num_tokens, num_kv_heads, head_dim], strides in v_stride
  void* k_pages;         // [num_pages, page_size, num_kv_heads, head_dim], strides in k_page_stride
  void* v_pages;         // same shape, strides in v_page_stride
  const int64_t* slots;  // [num_tokens] page * page_size + offset; negative or beyond the pages = skip
  int64_t num_tokens;
  int64_t num_slots;  // num_pages * page_size
  int64_t num_kv_heads;
  int64_t head_bytes;  // head_dim * element size
  int64_t page_size;
  TokenStride k_stride;  // in bytes, as all strides
  TokenStride v_stride;
  PageStride k_page_stride;
  PageStride v_page_stride;
};

cudaError_t append_kv(const AppendKvParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
