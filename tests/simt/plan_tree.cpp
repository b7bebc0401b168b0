#include "../../csrc/cuda/plan/plan_tree.cu"

#include "bind.h"

SIMT_BIND(plan_tree, treedecode::cuda::PlanTreeParams)
