// cudaError_t and cudaStream_t, which launchers' declarations need: of the toolkit, or of the tests' host shim.
#pragma once

#ifdef TREEDECODE_SIMT
#include "simt/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
