#include "../../csrc/cuda/pages/pages.cu"
#include "../../csrc/cuda/pages/copy_pages.cu"

#include "bind.h"

SIMT_BIND(fork_branches, treedecode::cuda::ForkParams)
SIMT_BIND(append_slots, treedecode::cuda::AppendParams)
SIMT_BIND(hold_pages, treedecode::cuda::HoldParams)
SIMT_BIND(adopt_pages, treedecode::cuda::AdoptParams)
SIMT_BIND(copy_pages, treedecode::cuda::CopyPagesParams)
