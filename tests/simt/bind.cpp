#include <string>

#include "bind.h"

SIMT_EXPORT void simt_configure(uint64_t seed, int resident_blocks, const char* drop) {
  static std::string dropped;
  dropped = drop ? drop : "";
  simt::options() = {seed, resident_blocks, drop ? dropped.c_str() : nullptr};
}

SIMT_EXPORT const char* simt_barriers() { return simt::barriers(); }
