// State of a run of the shim. simt.cpp has the calls of threads, scheduler.cpp chooses the thread that runs.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

inline constexpr int kNumBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

struct Block;

struct Thread {
  Fiber fiber;
  Position position;
  Block* block = nullptr;
  bool done = false;
  uint64_t backed_off = 0;         // when it last called back_off; it runs after the others of its warp
  const char* waits_at = nullptr;  // nullptr = may run
  Site site;
  std::vector<std::vector<Copy>> copy_groups;  // oldest first; the last one is open
  uint64_t num_drops = 0;                      // passes of a barrier that is left out

  struct Warp& warp();
};

// Lanes that wait for each other in a collective.
struct Rendezvous {
  const char* name;
  Site site;
  uint32_t mask;
  uint32_t arrived = 0;
  Exchange exchange;
};

struct Warp {
  std::vector<std::shared_ptr<Rendezvous>> pending;
  std::vector<Thread*> ready;
  uint64_t priority = 0;  // the warp with ready threads and the lowest priority runs; no two are equal
};

struct Barrier {
  std::vector<Thread*> waiting;
  int arrived = 0;  // of named barriers: includes threads that do not wait
  int count = 0;
  bool any = false;
  bool result = false;
  Site site;
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  int num_live = 0;
  std::array<Barrier, kNumBarriers> barriers;
  std::vector<Warp> warps;
  std::map<const void*, std::pair<void*, size_t>>
      shared;  // each array is an allocation, so that its bounds are checked
  void* dynamic = nullptr;

  ~Block() {
    for (auto& [key, array] : shared) ::operator delete(array.first, std::align_val_t{128});
    if (dynamic) ::operator delete(dynamic, std::align_val_t{128});
  }
};

struct Scheduler {
  Fiber main;
  Thread* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  size_t shared_bytes = 0;
  std::map<uint64_t, Warp*> ready;
  uint64_t num_back_offs = 0;

  uint64_t state = 0;
  bool failed = false;
  std::string error;
  std::set<std::string> barriers;
  std::string barrier_list;
  std::vector<char*> stacks;  // kept from run to run
};

Scheduler& scheduler();
inline Thread& self() { return *scheduler().current; }
// True if threads run in a fixed order.
inline bool ordered() { return options().seed < 2; }

void make_ready(Thread& t);
void wake(const std::vector<Thread*>& threads);
// Switches to the scheduler until this thread is ready and chosen.
void suspend();
void release_if_full(Block& block, Barrier& b);

std::string name_of(const Site& site);
[[noreturn]] void fail_here(const Site& site, const std::string& text);

}  // namespace simt
