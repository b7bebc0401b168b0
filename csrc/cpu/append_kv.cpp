#include "append_kv.h"

#include <cstring>

namespace treedecode::cpu {

void append_kv(const AppendKvParams& p, int64_t token_begin, int64_t token_end) {
  const char* k = static_cast<const char*>(p.k);
  const char* v = static_cast<const char*>(p.v);
  char* k_pages = static_cast<char*>(p.k_pages);
  char* v_pages = static_cast<char*>(p.v_pages);
  const int64_t size = p.element_size;
  const size_t row_bytes = static_cast<size_t>(p.head_dim * size);
  for (int64_t t = token_begin; t < token_end; ++t) {
    const int64_t slot = p.slots[t];
    if (slot < 0) continue;
    const int64_t page = slot / p.page_size;
    const int64_t offset = slot % p.page_size;
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      std::memcpy(
          k_pages + (page * p.k_page_stride.page + offset * p.k_page_stride.token + h * p.k_page_stride.head) * size,
          k + (t * p.k_stride.token + h * p.k_stride.head) * size, row_bytes);
      std::memcpy(
          v_pages + (page * p.v_page_stride.page + offset * p.v_page_stride.token + h * p.v_page_stride.head) * size,
          v + (t * p.v_stride.token + h * p.v_stride.head) * size, row_bytes);
    }
  }
}

}  // namespace treedecode::cpu
