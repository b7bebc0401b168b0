#pragma once

#include <optional>

#include "../../cuda/logits/logits.h"
#include "../logits.h"

namespace treedecode {

// Returns the params of logits and a mask that have been checked.
inline cuda::LogitsParams logits_params(const Tensor& logits, const std::optional<Tensor>& token_mask) {
  cuda::LogitsParams p{
      logits.const_data_ptr(),
      token_mask ? token_mask->const_data_ptr<int32_t>() : nullptr,
      logits.size(0),
      logits.size(1),
      logits.stride(0),
      token_mask ? token_mask->stride(0) : 0,
      0,
      0,
      kernel_dtype(logits),
  };
  cuda::set_chunks(p);
  return p;
}

}  // namespace treedecode
