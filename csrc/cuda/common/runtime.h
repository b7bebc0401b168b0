// Declares cudaError_t and cudaStream_t for launchers: those of the toolkit, or of the tests' host shim.
#pragma once

#ifdef TREEDECODE_SIMT
#include "simt/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
