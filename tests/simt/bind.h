// Makes a launcher callable from tests/support/simt_kernels.py: SIMT_BIND(append_kv, treedecode::cuda::AppendKvParams).
#pragma once

#include "simt.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

// Returns nullptr, or the error.
#define SIMT_BIND(op, Params)                                                          \
  SIMT_EXPORT const char* simt_##op(const Params* p) {                                 \
    return treedecode::cuda::op(*p, nullptr) == cudaSuccess ? nullptr : simt::error(); \
  }                                                                                    \
  SIMT_EXPORT size_t simt_sizeof_##op() { return sizeof(Params); }
