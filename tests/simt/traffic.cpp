#include "traffic.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "bind.h"

namespace simt {
namespace {

constexpr int kBanks = 8;  // of 16 bytes

struct Request {
  std::vector<const void*> to;
  std::vector<const void*> from;  // of the valid lanes
};

struct Counting {
  Traffic traffic{};
  std::map<std::tuple<uint64_t, int, uint32_t>, uint64_t> num_calls;            // block, thread, line
  std::map<std::tuple<uint64_t, int, uint32_t, uint64_t>, Request> unfinished;  // block, warp, line, nth
};
std::optional<Counting> counting;

uint64_t passes(const void* const* rows) {
  std::array<std::set<uintptr_t>, kBanks> of_bank;
  for (int i = 0; i < 8; ++i) {
    const auto word = reinterpret_cast<uintptr_t>(rows[i]) / 16;
    of_bank[word % kBanks].insert(word);
  }
  return std::max_element(of_bank.begin(), of_bank.end(), [](auto& a, auto& b) { return a.size() < b.size(); })->size();
}

void finish(const Request& r) {
  Traffic& t = counting->traffic;
  for (size_t i = 0; i < r.to.size(); i += 8) {
    ++t.copies;
    t.copy_passes += passes(&r.to[i]);
  }
  std::set<uintptr_t> sectors;
  for (const void* from : r.from) sectors.insert(reinterpret_cast<uintptr_t>(from) / 32);
  t.bytes += 16 * r.from.size();
  t.sectors += sectors.size();
}

}  // namespace

void count_traffic() { counting.emplace(); }

Traffic traffic() {
  const Traffic t = counting ? counting->traffic : Traffic{};
  counting.reset();
  return t;
}

void note_matrix(const void* const (&rows)[8]) {
  if (!counting) return;
  ++counting->traffic.matrices;
  counting->traffic.matrix_passes += passes(rows);
}

void note_copy(uint64_t block, int thread, uint32_t line, const void* to, const void* from, bool valid) {
  if (!counting) return;
  const std::tuple key(block, thread / 32, line, counting->num_calls[{block, thread, line}]++);
  Request& r = counting->unfinished[key];
  r.to.resize(32);
  r.to[thread % 32] = to;
  if (valid) r.from.push_back(from);
  if (std::count(r.to.begin(), r.to.end(), nullptr)) return;
  finish(r);
  counting->unfinished.erase(key);
}

}  // namespace simt

SIMT_EXPORT void simt_count_traffic() { simt::count_traffic(); }
SIMT_EXPORT void simt_traffic(simt::Traffic* t) { *t = simt::traffic(); }
