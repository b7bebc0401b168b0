#include "../../csrc/cuda/logits/beam_prune.cu"

#include "bind.h"

SIMT_BIND(beam_prune, treedecode::cuda::BeamPruneParams)
