#include "select.h"

#include <algorithm>
#include <functional>

namespace treedecode::cpu {

uint64_t keep_largest(uint64_t* keys, int64_t n, int64_t k) {
  std::nth_element(keys, keys + k - 1, keys + n, std::greater<>());
  return keys[k - 1];
}

void sort_descending(uint64_t* keys, int64_t n) { std::sort(keys, keys + n, std::greater<>()); }

}  // namespace treedecode::cpu
