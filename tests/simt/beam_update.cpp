#include "../../csrc/cuda/logits/beam_update.cu"

#include "bind.h"

SIMT_BIND(beam_update, treedecode::cuda::BeamUpdateParams)
