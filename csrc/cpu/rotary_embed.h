// rotary_embed: rotates the two halves of every head by its token's angles, in place.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "strides.h"

namespace treedecode::cpu {

struct RotaryEmbedParams {
  void* q;          // [num_tokens, num_qo_heads, head_dim], strides in q_stride
  void* k;          // [num_tokens, num_kv_heads, head_dim], strides in k_stride
  const void* cos;  // [num_tokens, head_dim]
  const void* sin;  // [num_tokens, head_dim]
  int64_t num_qo_heads;
  int64_t num_kv_heads;
  int64_t head_dim;      // even
  TokenStride q_stride;  // in elements, as all strides
  TokenStride k_stride;
  int64_t cos_stride;
  int64_t sin_stride;
  DType dtype;  // of all
};

}  // namespace treedecode::cpu

TD_DECLARE_KERNEL(rotary_embed, void rotary_embed(const RotaryEmbedParams& p, int64_t token_begin, int64_t token_end))
