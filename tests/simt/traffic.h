// Counts the accesses to a GPU's memory: passes over banks of shared memory, sectors of global memory.
#pragma once

#include <cstdint>

namespace simt {

struct Traffic {
  uint64_t matrices;       // of 8 x 8, read by ldmatrix
  uint64_t matrix_passes;  // over shared memory for these; one each where no two rows are in the same banks
  uint64_t copies;         // groups of 8 lanes, written to shared memory by cp_async
  uint64_t copy_passes;    // one each where no two lanes' 16 bytes are in the same banks
  uint64_t bytes;          // read by cp_async
  uint64_t sectors;        // of 32 bytes, counted once for each access of a warp; bytes / 32 where all bytes are used
};

// Starts counting, from zero.
void count_traffic();
// Ends counting, and returns the counts.
Traffic traffic();

// For ptx.h and simt.cpp: they do nothing unless traffic is counted.
void note_matrix(const void* const (&rows)[8]);
// Notes one lane's cp_async. The nth of a lane at a line of the source belongs to the nth of its warp there.
void note_copy(uint64_t block, int thread, uint32_t line, const void* to, const void* from, bool valid);

}  // namespace simt
