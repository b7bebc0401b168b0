#include "self_test.cu"

#include "bind.h"

SIMT_BIND(toy_reverse, treedecode::cuda::ToyParams)
SIMT_BIND(toy_divergence, treedecode::cuda::ToyParams)
SIMT_BIND(toy_two_barriers, treedecode::cuda::ToyParams)
SIMT_BIND(toy_deadlock, treedecode::cuda::ToyParams)
SIMT_BIND(toy_early_exit, treedecode::cuda::ToyParams)
SIMT_BIND(toy_unwritten, treedecode::cuda::ToyParams)
SIMT_BIND(toy_cp_async, treedecode::cuda::ToyParams)
SIMT_BIND(toy_hand_over, treedecode::cuda::ToyParams)
SIMT_BIND(toy_last_block, treedecode::cuda::ToyParams)
SIMT_BIND(toy_poll, treedecode::cuda::ToyParams)
SIMT_BIND(toy_scan, treedecode::cuda::ToyParams)
SIMT_BIND(toy_scans, treedecode::cuda::ToyParams)
SIMT_BIND(toy_atomics, treedecode::cuda::ToyParams)
SIMT_BIND(toy_wide, treedecode::cuda::ToyParams)
SIMT_BIND(toy_fragments, treedecode::cuda::FragmentParams)
