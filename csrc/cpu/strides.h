// Strides of tensors by the names of their dimensions, in elements or in bytes as the params say.
#pragma once

#include <cstdint>

namespace treedecode {

// Of [num_tokens, num_heads, head_dim].
struct TokenStride {
  int64_t token;
  int64_t head;
};

// Of [num_pages, page_size, num_kv_heads, head_dim].
struct PageStride {
  int64_t page;
  int64_t token;
  int64_t head;
};

// Of [num_layers, 2, num_pages, ...], a page being contiguous.
struct CacheStride {
  int64_t layer;
  int64_t kv;  // from K to V
  int64_t page;
};

}  // namespace treedecode
