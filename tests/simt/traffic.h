// Counts what a GPU's memory would be asked for: banks of shared memory, sectors of global memory.
#pragma once

#include <cstdint>

namespace simt {

struct Traffic {
  uint64_t matrices;       // 8 x 8, that ldmatrix has read
  uint64_t matrix_passes;  // through shared memory, one each where no two rows lie in the same banks
  uint64_t copies;         // eights of lanes, that cp_async has written to shared memory
  uint64_t copy_passes;    // one each where no two of the lanes' 16 bytes lie in the same banks
  uint64_t bytes;          // that cp_async has read
  uint64_t sectors;        // of 32 bytes, once for each warp that asks at once; bytes / 32 where all are used
};

// Starts counting, from zero.
void count_traffic();
// Ends it.
Traffic traffic();

// For ptx.h and simt.cpp: nothing, unless traffic is counted.
void note_matrix(const void* const (&rows)[8]);
// A lane's nth cp_async at a line of the source, which is the warp's nth there.
void note_copy(uint64_t block, int thread, uint32_t line, const void* to, const void* from, bool valid);

}  // namespace simt
