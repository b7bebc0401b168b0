#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>

#if defined(__x86_64__)
asm(R"(
.text
.globl td_simt_switch
.hidden td_simt_switch
.type td_simt_switch, @function
td_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size td_simt_switch, .-td_simt_switch
)");
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Returns a priority: ascending or descending in the order of threads, or at random. The lower bits keep all different.
uint64_t draw_priority(uint64_t warp_index) {
  if (options().seed == 0) return warp_index;
  if (options().seed == 1) return (uint64_t{1} << 32) - 1 - warp_index;
  return random() >> 34 << 32 | warp_index;
}

// Returns the thread that runs next. The first warp runs ahead of all others as far as barriers let it, which shows
// more mistakes than drawing single threads, which stay close together. How long a warp stays first depends on the
// seed.
Thread& next_thread() {
  Scheduler& s = scheduler();
  auto entry = s.ready.begin();
  if (!ordered() && random() % 32 == 0) std::advance(entry, random() % s.ready.size());
  Warp& warp = *entry->second;
  auto t = warp.ready.begin();
  const auto earlier = [](Thread* a, Thread* b) {
    if (a->backed_off != b->backed_off) return (a->backed_off < b->backed_off) == (options().seed == 0);
    return a->position.thread < b->position.thread;
  };
  if (options().seed == 0) t = std::min_element(warp.ready.begin(), warp.ready.end(), earlier);
  else if (options().seed == 1) t = std::max_element(warp.ready.begin(), warp.ready.end(), earlier);
  else t += static_cast<ptrdiff_t>(random() % warp.ready.size());
  Thread& thread = **t;
  warp.ready.erase(t);
  s.ready.erase(entry);
  constexpr std::array<uint64_t, 4> kTurns{1, 8, 64, 512};
  if (!ordered() && random() % kTurns[options().seed % 4] == 0) {
    warp.priority = draw_priority(warp.priority & UINT32_MAX);
  }
  if (!warp.ready.empty()) s.ready.emplace(warp.priority, &warp);
  return thread;
}

void fail_with(const std::string& text) {
  Scheduler& s = scheduler();
  s.failed = true;
  s.error = text;
}

[[noreturn]] void abandon() {
  self().fiber.switch_to(scheduler().main, true);
  __builtin_unreachable();
}

std::string where(const Thread& t) {
  return "thread " + std::to_string(t.position.thread) + " of block " + std::to_string(t.position.block[0]);
}

void check_exit(Thread& t) {
  const uint32_t lane = 1u << (t.position.thread % 32);
  for (const auto& r : t.warp().pending) {
    if (r->mask & lane) {
      fail_with(name_of(r->site) + ": " + where(t) + " has ended, and lanes of its warp wait for it at " + r->name);
    }
  }
}

void thread_main() {
  Scheduler& s = scheduler();
  Thread& t = self();
  t.fiber.entered(s.main);
  (*s.kernel)();
  t.done = true;
  --t.block->num_live;
  check_exit(t);
  release_if_full(*t.block, t.block->barriers[0]);
  abandon();
}

char* stack(size_t i) {
  std::vector<char*>& stacks = scheduler().stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    mprotect(p, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

std::string waiting_threads(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::map<std::string, int> counts;
  for (const auto& block : blocks) {
    for (const auto& t : block->threads) {
      if (!t->done) ++counts[std::string(t->waits_at ? t->waits_at : "nothing") + " (" + name_of(t->site) + ")"];
    }
  }
  std::string text = "deadlock:";
  const char* separator = " ";
  for (const auto& [location, count] : counts) {
    text += separator + std::to_string(count) + " threads wait at " + location;
    separator = ", ";
  }
  return text;
}

// Runs `blocks` to their end, interleaved.
void run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  Scheduler& s = scheduler();
  s.ready.clear();
  size_t num_stacks = 0;
  uint64_t num_warps = 0;
  for (auto& block : blocks) {
    for (Warp& warp : block->warps) warp.priority = draw_priority(num_warps++);
    for (auto& t : block->threads) {
      char* base = stack(num_stacks++);
      t->fiber.start(base + 4096, kStackBytes - 4096, &thread_main);
      make_ready(*t);
    }
  }
  while (!s.ready.empty() && !s.failed) {
    s.current = &next_thread();
    s.main.switch_to(s.current->fiber);
  }
  if (s.failed) return;
  for (auto& block : blocks) {
    if (block->num_live > 0) return fail_with(waiting_threads(blocks));
  }
}

}  // namespace

std::string name_of(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

Warp& Thread::warp() { return block->warps[position.thread / 32]; }

Scheduler& scheduler() {
  static Scheduler s;
  return s;
}
void make_ready(Thread& t) {
  Warp& warp = t.warp();
  t.waits_at = nullptr;
  warp.ready.push_back(&t);
  scheduler().ready.emplace(warp.priority, &warp);
}

void wake(const std::vector<Thread*>& threads) {
  for (Thread* t : threads) {
    t->backed_off = 0;
    make_ready(*t);
  }
}

void suspend() {
  Thread& t = self();
  t.fiber.switch_to(scheduler().main);
}

[[noreturn]] void fail_here(const Site& site, const std::string& text) {
  fail_with(name_of(site) + ": " + where(self()) + ": " + text);
  abandon();
}

void release_if_full(Block& block, Barrier& b) {
  const bool full = &b == &block.barriers[0]
                        ? static_cast<int>(b.waiting.size()) == block.num_live && block.num_live > 0
                        : b.count > 0 && b.arrived == b.count;
  if (!full) return;
  b.result = b.any;
  b.any = false;
  b.arrived = b.count = 0;
  wake(std::exchange(b.waiting, {}));
}

Options& options() {
  static Options o;
  return o;
}

const char* error() { return scheduler().error.c_str(); }

const char* barriers() {
  Scheduler& s = scheduler();
  s.barrier_list.clear();
  for (const std::string& site : s.barriers) s.barrier_list += site + "\n";
  s.barriers.clear();
  return s.barrier_list.c_str();
}

cudaError_t run(uint32_t grid_x, uint32_t grid_y, uint32_t grid_z, int num_threads, size_t shared_bytes,
                const std::function<void()>& kernel) {
  Scheduler& s = scheduler();
  s.failed = false;
  s.error.clear();
  s.kernel = &kernel;
  s.shared_bytes = shared_bytes;
  s.state = options().seed;
  s.num_back_offs = 0;
  if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || grid_z == 0 || grid_z > 65535 || num_threads < 1 ||
      num_threads > 1024 || grid_x > INT32_MAX || shared_bytes > (227 << 10)) {
    s.error = "invalid launch configuration";
    return cudaErrorInvalidValue;
  }
  const uint64_t num_blocks = uint64_t{grid_x} * grid_y * grid_z;
  std::vector<std::unique_ptr<Block>> blocks;
  for (uint64_t i = 0; i < num_blocks && !s.failed; ++i) {
    auto block = std::make_unique<Block>();
    block->num_live = num_threads;
    block->warps.resize((num_threads + 31) / 32);
    for (int thread = 0; thread < num_threads; ++thread) {
      auto t = std::make_unique<Thread>();
      t->block = block.get();
      const auto x = static_cast<uint32_t>(i % grid_x), y = static_cast<uint32_t>(i / grid_x % grid_y),
                 z = static_cast<uint32_t>(i / grid_x / grid_y);
      t->position = {thread, num_threads, {x, y, z}, {grid_x, grid_y, grid_z}};
      t->copy_groups.resize(1);
      block->threads.push_back(std::move(t));
    }
    blocks.push_back(std::move(block));
    if (static_cast<int>(blocks.size()) == options().resident_blocks || i + 1 == num_blocks) {
      run_blocks(blocks);
      blocks.clear();
    }
  }
  s.current = nullptr;
  return s.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void fail(const Site& site, const char* text) { fail_here(site, text); }

uint64_t random() {  // splitmix64
  uint64_t z = (scheduler().state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace simt
