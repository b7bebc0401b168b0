#include "cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace treedecode::cpu {
namespace {

// Returns quota / period of a group's folder, or 0 where there is no limit.
double cpus_of_group(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::ifstream v2(folder + "/cpu.max"); v2) {
    v2 >> quota >> period;  // "max" is not a number and leaves 0
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;  // -1: no limit
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

// Returns the smallest limit of the process' group and the groups above it, or 0 where there is none.
double cpus_of_groups(const std::string& root) {
  double least = 0;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    // hierarchy:controllers:path; version 2 has no controllers
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string folder = root + "/sys/fs/cgroup";
    if (!controllers.empty()) {
      if (("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
      folder += "/" + controllers;
    }
    std::string path = line.substr(second + 1);
    while (true) {
      const double cpus = cpus_of_group(folder + (path == "/" ? "" : path));
      if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/'));  // inside a container the path may not exist, but its root is the container's group
    }
  }
  return least;
}

// Returns the CPUs of the affinity mask.
int cpus_in_mask() { return std::max(1u, std::thread::hardware_concurrency()); }

// Returns the cores of the affinity mask, or 0 if the system does not say.
int cores_in_mask() {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 0;
  std::set<std::string> cores;  // by the numbers of their CPUs
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    std::string siblings;
    std::ifstream("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list") >> siblings;
    if (!siblings.empty()) cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
#else
  return 0;
#endif
}

}  // namespace

bool is_default_threads(int count) {
  static const int cpus = cpus_in_mask(), cores = cores_in_mask();
  return count == cpus || count == cores;
}

int available_cpus(const std::string& root) {
  const int in_mask = cpus_in_mask();
  const double quota = cpus_of_groups(root);
  return quota > 0 ? std::clamp(static_cast<int>(std::ceil(quota)), 1, in_mask) : in_mask;
}

}  // namespace treedecode::cpu
