#include "../../csrc/cuda/pages/append_kv.cu"

#include "bind.h"

SIMT_BIND(append_kv, treedecode::cuda::AppendKvParams)
