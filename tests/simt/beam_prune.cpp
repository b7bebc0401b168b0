#include "../../csrc/cuda/beam_prune.cu"

#include "bind.h"

SIMT_BIND(beam_prune, treedecode::cuda::BeamPruneParams)
