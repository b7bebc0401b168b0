// Checks shared by the ops that read logits: beam_prune and sample.
#pragma once

#include <memory>

#include "../check.h"
#include "kernel_dtype.h"

namespace treedecode {

// Allocates memory that is not initialised.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n > 0 ? n : 1)]);
}

inline void check_logits(const Tensor& logits) {
  check_shape(logits, "logits", "[rows, vocab]", {-1, -1});
  check_float_dtype(logits, "logits");
  check_unit_stride(logits, "logits");
  STD_TORCH_CHECK(logits.size(1) > 0 && logits.size(1) < INT32_MAX,
                  "[ValueError] logits: expected shape [rows, vocab] with 1 to 2^31 - 2 tokens, got ",
                  shape_of(logits));
}

inline void check_token_mask(const Tensor& mask, const Tensor& logits) {
  check_shape(mask, "token_mask", "[rows, ceil(vocab / 32)]", {logits.size(0), (logits.size(1) + 31) / 32});
  check_dtype(mask, "token_mask", ScalarType::Int);
  check_unit_stride(mask, "token_mask");
}

}  // namespace treedecode
