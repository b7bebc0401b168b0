#include "../../csrc/cuda/logits/sample.cu"

#include "bind.h"

SIMT_BIND(sample, treedecode::cuda::SampleParams)
