// The number of CPUs that this process may keep busy.
#pragma once

#include <string>

namespace treedecode::cpu {

// Returns the least of the CPUs of the affinity mask and the CPU time that the control groups (v1 or v2) allow, rounded
// up; at least 1. It reads files, so ask once. `root` is the folder that holds `proc` and `sys`, for tests.
int available_cpus(const std::string& root = "");

// Returns whether `count` is a number of threads that libraries start by default: that of the CPUs of the affinity
// mask, or of their cores, each of which may be several CPUs.
bool is_default_threads(int count);

}  // namespace treedecode::cpu
