// append_kv: writes K and V of new tokens into their cache slots.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "strides.h"

namespace treedecode::cpu {

struct AppendKvParams {
  const void* k;         // [num_tokens, num_kv_heads, head_dim], strides in k_stride
  const void* v;         // [num_tokens, num_kv_heads, head_dim], strides in v_stride
  void* k_pages;         // [num_pages, page_size, num_kv_heads, head_dim], strides in k_page_stride
  void* v_pages;         // same shape, strides in v_page_stride
  const int64_t* slots;  // [num_tokens] page * page_size + offset; negative = skip
  int64_t num_tokens;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  int64_t element_size;  // bytes
  TokenStride k_stride;  // in elements, as all strides
  TokenStride v_stride;
  PageStride k_page_stride;
  PageStride v_page_stride;
};

// Only copies, so one build serves every ISA.
void append_kv(const AppendKvParams& p, int64_t token_begin, int64_t token_end);

}  // namespace treedecode::cpu
