#include "simt.h"

#include <algorithm>

#include "scheduler.h"
#include "traffic.h"

namespace simt {
namespace {

constexpr uint64_t kMaxBackOffs = 1 << 20;
constexpr uint64_t kMaxDrops = 1 << 12;

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Uninitialised shared memory holds NaN in every floating-point format, and -1.
void* poisoned(size_t bytes) {
  void* p = ::operator new(bytes, std::align_val_t{128});
  std::memset(p, 0xff, bytes);
  return p;
}

void perform(const Copy& c) {
  if (c.valid) std::memcpy(c.to, c.from, c.bytes);
  else std::memset(c.to, 0, c.bytes);
}

}  // namespace

const Position& position() { return self().position; }

void maybe_yield() {
  if (ordered() || random() % 2) return;
  make_ready(self());
  suspend();
}

void back_off(const Site& site) {
  Scheduler& s = scheduler();
  if (++s.num_back_offs > kMaxBackOffs) fail_here(site, "livelock: what this thread polls for does not come");
  self().backed_off = s.num_back_offs;
  Warp& warp = self().warp();
  if (auto entry = s.ready.find(warp.priority); entry != s.ready.end()) s.ready.erase(entry);
  // Moves the warp behind all others: with fixed priorities a polling warp would run for ever.
  if (!s.ready.empty()) warp.priority = ((s.ready.rbegin()->first >> 32) + 1) << 32 | (warp.priority & UINT32_MAX);
  make_ready(self());
  suspend();
}

void* shared_array(const void* key, size_t bytes) {
  auto [entry, is_new] = self().block->shared.try_emplace(key);
  if (is_new) entry->second = {poisoned(bytes), bytes};
  return entry->second.first;
}

void* dynamic_shared() {
  Block& block = *self().block;
  if (!block.dynamic) block.dynamic = poisoned(scheduler().shared_bytes);
  return block.dynamic;
}

bool sync_threads(bool value, const Site& site) {
  Thread& t = self();
  const std::string name = name_of(site);
  scheduler().barriers.insert(name);
  if (options().drop && name == options().drop) {
    if (++self().num_drops > kMaxDrops) fail_here(site, "livelock: this thread goes round in circles");
    return value;
  }
  Barrier& b = t.block->barriers[0];
  if (b.waiting.empty()) b.site = site;
  else if (!same(b.site, site)) fail_here(site, "sync_threads, while others wait at that of " + name_of(b.site));
  b.any |= value;
  b.waiting.push_back(&t);
  t.waits_at = "sync_threads";
  t.site = site;
  release_if_full(*t.block, b);
  suspend();
  return b.result;
}

void named_barrier(int id, int count, bool wait, const Site& site) {
  Thread& t = self();
  if (id < 1 || id >= kNumBarriers) fail_here(site, "a named barrier is one of 1 .. 15");
  if (count < 32 || count % 32) fail_here(site, "a named barrier counts whole warps");
  Barrier& b = t.block->barriers[id];
  if (b.count && b.count != count) fail_here(site, "a named barrier with another count than at " + name_of(b.site));
  b.count = count;
  b.site = site;
  ++b.arrived;
  if (wait) {
    b.waiting.push_back(&t);
    t.waits_at = "named_barrier_sync";
    t.site = site;
  }
  release_if_full(*t.block, b);
  if (wait) suspend();
}

Exchange collective(const char* name, uint32_t mask, const void* operand, size_t bytes, const Site& site) {
  Thread& t = self();
  const int lane = t.position.thread % 32, first = t.position.thread - lane;
  if (!(mask >> lane & 1)) fail_here(site, std::string(name) + " with a mask that this lane is not in");
  auto& pending = t.warp().pending;
  std::shared_ptr<Rendezvous> r;
  for (const auto& other : pending) {
    if (!(other->mask & mask)) continue;
    if (other->mask != mask || std::strcmp(other->name, name) != 0 || !same(other->site, site)) {
      fail_here(site, std::string("divergence: ") + name + ", while lanes of its warp wait at " + other->name + " (" +
                          name_of(other->site) + ")");
    }
    r = other;
  }
  if (!r) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      if (first + i >= t.position.num_threads)
        fail_here(site, std::string(name) + " with lanes beyond the block's end");
      if (t.block->threads[first + i]->done) fail_here(site, std::string(name) + " with lanes that have ended");
    }
    r = std::make_shared<Rendezvous>();
    r->name = name;
    r->site = site;
    r->mask = mask;
    pending.push_back(r);
  }
  r->arrived |= 1u << lane;
  std::memcpy(r->exchange.operand[lane].data(), operand, bytes);
  t.waits_at = name;
  t.site = site;
  if (r->arrived == mask) {
    std::erase(pending, r);
    std::vector<Thread*> lanes;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) lanes.push_back(t.block->threads[first + i].get());
    }
    wake(lanes);
  }
  suspend();
  return r->exchange;
}

void copy_later(void* to, const void* from, size_t bytes, bool valid, const Site& site) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fail_here(site, "cp_async of a misaligned address");
  }
  const Position& p = self().position;
  const uint64_t block = p.block[0] + uint64_t{p.grid[0]} * (p.block[1] + uint64_t{p.grid[1]} * p.block[2]);
  if (bytes == 16) note_copy(block, p.thread, site.line(), to, from, valid);
  const Copy copy{to, from, bytes, valid};
  if (!ordered() && random() % 4 == 0) return perform(copy);
  std::memset(to, 0xff, bytes);
  self().copy_groups.back().push_back(copy);
}

void commit_copies() { self().copy_groups.emplace_back(); }

void wait_for_copies(int num_pending_groups) {
  auto& groups = self().copy_groups;
  while (static_cast<int>(groups.size()) - 1 > num_pending_groups) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace simt
