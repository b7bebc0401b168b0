// The status of the page state, on the host and on the device.
#pragma once

#include <cstdint>

namespace treedecode {

enum PagesError : int32_t {
  kOk = 0,
  kOutOfPages = 1,
  kBadArgument = 2,  // on the device, which cannot raise
};

struct PageStatus {
  int32_t error;  // a PagesError; sticky: page ops do nothing until the owner sets it back to kOk
  int32_t num_free;
  int32_t num_needed;  // pages that the refused op needed
  int32_t peak_used;   // most pages ever used at once
};

inline constexpr int64_t kStatusSize = sizeof(PageStatus) / sizeof(int32_t);

}  // namespace treedecode
