// merge_states: merges the attention to several sets of keys into the attention to all of them.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "isa.h"
#include "strides.h"

namespace treedecode::cpu {

struct MergeStatesParams {
  const void* part_out;         // [num_parts, num_heads, head_dim], strides in part_stride
  const float* part_lse;        // [num_parts, num_heads]
  const int32_t* merge_indptr;  // [num_states + 1]
  void* out;                    // [num_states, num_heads, head_dim]
  float* lse;                   // [num_states, num_heads]
  int64_t num_heads;
  int64_t head_dim;
  TokenStride part_stride;  // of parts and heads, in elements
  DType dtype;              // of part_out and out
};

}  // namespace treedecode::cpu

TD_DECLARE_KERNEL(merge_states, void merge_states(const ::treedecode::cpu::MergeStatesParams& p, int64_t state_begin,
                                                  int64_t state_end))
