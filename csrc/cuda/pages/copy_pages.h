// copy_pages on the device: copies of pages within the cache, all layers in one launch.
#pragma once

#include <cstdint>

#include "../../cpu/strides.h"
#include "../common/runtime.h"

namespace treedecode::cuda {

struct CopyPagesParams {
  char* kv;                   // [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim], a page contiguous
  const int32_t* src;         // [n]
  const int32_t* dst;         // [n]; negative = skip, and so is a copy with a page or a length out of range
  const int32_t* num_tokens;  // [n] or nullptr: whole pages
  const int32_t* num_copies;  // [1], at most n, or nullptr: all n
  int64_t n;
  int64_t num_pages;
  int64_t page_size;
  int64_t num_planes;  // num_layers * 2
  int64_t num_kv_heads;
  int64_t head_bytes;   // page_size * head_dim * element size
  int64_t token_bytes;  // head_dim * element size
  CacheStride stride_bytes;
};

cudaError_t copy_pages(const CopyPagesParams& p, cudaStream_t stream);

}  // namespace treedecode::cuda
