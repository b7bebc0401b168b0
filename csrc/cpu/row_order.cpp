#include "row_order.h"

#include <algorithm>
#include <vector>

namespace treedecode::cpu {
namespace {

// Returns the length of the common prefix of a and b, at most n.
int64_t common_prefix(const int32_t* a, const int32_t* b, int64_t n) {
  constexpr int64_t kBlock = 16;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    int32_t differ = 0;
    for (int64_t j = 0; j < kBlock; ++j) differ |= a[i + j] ^ b[i + j];
    if (differ) break;
  }
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

const int32_t* pages_of(const PlanTreeParams& p, int64_t row) { return p.page_table + row * p.table_stride; }
int64_t num_pages(const PlanTreeParams& p, int64_t row) { return (p.seq_lens[row] + p.page_size - 1) / p.page_size; }

}  // namespace

void common_pages(const PlanTreeParams& p, int32_t* shared, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (i == 0) {
      shared[0] = 0;
      continue;
    }
    const int32_t before = p.order[i - 1], row = p.order[i];
    const int64_t used = std::min(num_pages(p, before), num_pages(p, row));
    shared[i] = static_cast<int32_t>(common_prefix(pages_of(p, before), pages_of(p, row), used));
  }
}

// The rows that share `depth` pages are an interval, cut into children where neighbours share no more. More could be
// shared if two children went on with the same page.
bool is_depth_first(const PlanTreeParams& p, const int32_t* shared) {
  struct Interval {
    int32_t depth;
    size_t first_child;
  };
  std::vector<Interval> open{{0, 0}};
  std::vector<int32_t> children;  // of all open intervals, the page that each goes on with
  children.reserve(static_cast<size_t>(p.num_rows));
  const auto begin_child = [&](int64_t i, int32_t depth) {
    const int32_t row = p.order[i];
    if (num_pages(p, row) > depth) children.push_back(pages_of(p, row)[depth]);
  };
  const auto close = [&] {
    const auto first = children.begin() + static_cast<std::ptrdiff_t>(open.back().first_child);
    std::sort(first, children.end());
    const bool differ = std::adjacent_find(first, children.end()) == children.end();
    children.erase(first, children.end());
    open.pop_back();
    return differ;
  };
  for (int64_t i = 0; i < p.num_rows; ++i) {
    while (open.back().depth > shared[i]) {
      if (!close()) return false;
    }
    if (open.back().depth < shared[i]) {
      open.push_back({shared[i], children.size()});
      begin_child(i - 1, shared[i]);
    }
    begin_child(i, shared[i]);
  }
  while (!open.empty()) {
    if (!close()) return false;
  }
  return true;
}

void sort_rows(const PlanTreeParams& p) {
  const auto is_before = [&](int32_t a, int32_t b) {
    const int64_t a_pages = num_pages(p, a), b_pages = num_pages(p, b), both = std::min(a_pages, b_pages);
    const int64_t common = common_prefix(pages_of(p, a), pages_of(p, b), both);
    return common < both ? pages_of(p, a)[common] < pages_of(p, b)[common] : a_pages < b_pages;
  };
  if (!std::is_sorted(p.order, p.order + p.num_rows, is_before)) {
    std::stable_sort(p.order, p.order + p.num_rows, is_before);
  }
}

}  // namespace treedecode::cpu
