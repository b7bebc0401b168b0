#include "pages.h"

#include <algorithm>
#include <cstring>

namespace treedecode::cpu {
namespace {

// Counters by index. The memory is kept between calls and all zero then: each op clears the marks it set.
class Marks {
 public:
  explicit Marks(int64_t size) {
    if (static_cast<int64_t>(counts().size()) < size) counts().resize(size);
  }
  ~Marks() {
    for (int32_t i : touched()) counts()[i] = 0;
    touched().clear();
  }
  Marks(const Marks&) = delete;
  Marks& operator=(const Marks&) = delete;

  // Marks `i`. Returns the number of earlier marks.
  int32_t add(int32_t i) {
    touched().push_back(i);
    return counts()[i]++;
  }

 private:
  static std::vector<int32_t>& counts() {
    thread_local std::vector<int32_t> counts;
    return counts;
  }
  static std::vector<int32_t>& touched() {
    thread_local std::vector<int32_t> touched;
    return touched;
  }
};

void drop_reference(const PageState& s, int32_t page) {
  if (--s.refcount[page] == 0) s.free_pages[s.status->num_free++] = page;
}

Fault check_rows(const PageState& s, const int32_t* rows, int64_t n, const char* name, bool unique) {
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || rows[i] >= s.max_branches) return {name, "rows in 0 ..", s.max_branches - 1, rows[i], i};
  }
  if (!unique) return {};
  Marks marks(s.max_branches);
  for (int64_t i = 0; i < n; ++i) {
    if (marks.add(rows[i])) return {name, "each row once, rows below", s.max_branches, rows[i], i};
  }
  return {};
}

// Returns the longest length that fits into a row of the table, and into an int32.
int64_t max_len(const PageState& s) { return std::min<int64_t>(s.max_pages * s.page_size, INT32_MAX); }

// Lengths and page ids are used as addresses: out of range, they would read or write other memory.
bool len_in_range(const PageState& s, int32_t row) { return s.seq_lens[row] >= 0 && s.seq_lens[row] <= max_len(s); }

Fault bad_len(const PageState& s, int32_t row) {
  return {"seq_lens", "lengths in 0 ..", max_len(s), s.seq_lens[row], row};
}

bool pages_in_range(const PageState& s, int32_t row, int64_t begin, int64_t end) {
  const int32_t* pages = s.page_table + row * s.max_pages;
  uint32_t largest = 0;  // no early exit: the loop is a few vector instructions
  for (int64_t j = begin; j < end; ++j) largest = std::max(largest, static_cast<uint32_t>(pages[j]));
  return begin >= end || largest < static_cast<uint64_t>(s.num_pages);
}

Fault bad_page(const PageState& s, int32_t row, int64_t begin) {
  int64_t i = row * s.max_pages + begin;
  while (s.page_table[i] >= 0 && s.page_table[i] < s.num_pages) ++i;
  return {"page_table", "page ids in 0 ..", s.num_pages - 1, s.page_table[i], i};
}

}  // namespace

Fault fork_branches(const PageState& s, const ForkParams& p) {
  if (Fault f = check_rows(s, p.src, p.n, "src", false); f.argument) return f;
  if (Fault f = check_rows(s, p.dst, p.n, "dst", true); f.argument) return f;
  auto new_len = [&](int64_t i) -> int64_t { return p.lens ? p.lens[i] : s.seq_lens[p.src[i]]; };
  int64_t num_entries = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    if (!len_in_range(s, p.src[i])) return bad_len(s, p.src[i]);
    if (!len_in_range(s, p.dst[i])) return bad_len(s, p.dst[i]);
    const int64_t len = new_len(i), limit = s.seq_lens[p.src[i]];
    if (len < 0 || len > limit) return {"lens", "lengths from 0 to the source's", limit, len, i};
    if (!pages_in_range(s, p.src[i], 0, s.pages_of(len))) return bad_page(s, p.src[i], 0);
    const int64_t checked = p.src[i] == p.dst[i] ? s.pages_of(len) : 0;
    if (!pages_in_range(s, p.dst[i], checked, s.pages_of(s.seq_lens[p.dst[i]]))) return bad_page(s, p.dst[i], checked);
    num_entries += s.pages_of(len);
  }
  if (s.status->error) return {};

  // New rows are read in full before any row is written: src and dst may overlap in any way.
  thread_local std::vector<int32_t> scratch;  // the new rows, one after the other
  thread_local std::vector<int32_t> new_lens;
  if (static_cast<int64_t>(scratch.size()) < num_entries) scratch.resize(num_entries);
  new_lens.resize(p.n);
  // Entries that stay as they are (a common prefix, when beams are reordered) need no reference counting.
  int32_t* next = scratch.data();
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t len = new_len(i), num_new = s.pages_of(len);
    new_lens[i] = static_cast<int32_t>(len);
    const int32_t* from = s.page_table + p.src[i] * s.max_pages;
    const int32_t* old = s.page_table + p.dst[i] * s.max_pages;
    const int64_t num_both = std::min(num_new, s.pages_of(s.seq_lens[p.dst[i]]));
    for (int64_t j = 0; j < num_both; ++j) s.refcount[from[j]] += from[j] != old[j];
    for (int64_t j = num_both; j < num_new; ++j) ++s.refcount[from[j]];
    std::copy_n(from, num_new, next);
    next += num_new;
  }
  next = scratch.data();
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t num_new = s.pages_of(new_lens[i]);
    int32_t* old = s.page_table + p.dst[i] * s.max_pages;
    // Last page first, so that the stack hands a released branch's pages out again in ascending position.
    for (int64_t j = s.pages_of(s.seq_lens[p.dst[i]]) - 1; j >= 0; --j) {
      if (j >= num_new || old[j] != next[j]) drop_reference(s, old[j]);
    }
    std::copy_n(next, num_new, old);
    s.seq_lens[p.dst[i]] = new_lens[i];
    next += num_new;
  }
  return {};
}

Fault append_slots(const PageState& s, const AppendParams& p, PageCopies& copies) {
  copies.src.clear();
  copies.dst.clear();
  copies.num_tokens.clear();
  if (Fault f = check_rows(s, p.rows, p.n, "rows", true); f.argument) return f;
  int64_t num_slots = 0;
  for (int64_t i = 0; i < p.n; ++i) {
    if (!len_in_range(s, p.rows[i])) return bad_len(s, p.rows[i]);
    const int64_t q_len = p.q_lens ? p.q_lens[i] : 1, room = max_len(s) - s.seq_lens[p.rows[i]];
    if (q_len < 0 || q_len > room)
      return {"q_lens", "lengths from 0 to the room left in the row's page table,", room, q_len, i};
    num_slots += q_len;
  }
  if (num_slots > p.num_slots) return {"slots", "at least the sum of q_lens,", num_slots, p.num_slots, 0};

  // Count. Of the rows that share a partial last page, the first refcount - 1 in this call copy it. If all of them are
  // in this call, the last one writes in place: row i copies when refcount > 1 + (earlier sharers in this call).
  thread_local std::vector<uint8_t> copied;
  copied.assign(p.n, 0);
  int64_t num_needed = 0;
  {
    Marks sharers(s.num_pages);
    for (int64_t i = 0; i < p.n; ++i) {
      const int64_t q_len = p.q_lens ? p.q_lens[i] : 1, len = s.seq_lens[p.rows[i]];
      if (q_len == 0) continue;
      num_needed += s.pages_of(len + q_len) - s.pages_of(len);
      if (len % s.page_size == 0) continue;
      const int64_t j = len / s.page_size;
      if (!pages_in_range(s, p.rows[i], j, j + 1)) return bad_page(s, p.rows[i], j);
      const int32_t last = s.page_table[p.rows[i] * s.max_pages + j];
      if (s.refcount[last] == 1) continue;
      copied[i] = s.refcount[last] > 1 + sharers.add(last);
      num_needed += copied[i];
    }
  }
  if (s.status->error == kOk && num_needed > s.status->num_free) {
    s.status->error = kOutOfPages;
    s.status->num_needed = static_cast<int32_t>(std::min<int64_t>(num_needed, INT32_MAX));
  }
  if (s.status->error != kOk) {
    std::fill_n(p.slots, p.num_slots, int64_t{-1});
    return {};
  }

  for (int64_t j = s.status->num_free - num_needed; j < s.status->num_free; ++j) {
    if (s.free_pages[j] < 0 || s.free_pages[j] >= s.num_pages) {
      return {"free_pages", "page ids in 0 ..", s.num_pages - 1, s.free_pages[j], j};
    }
  }

  // Commit. The k-th page that the call takes is the k-th from the top of the stack. Pages are taken in the order of
  // rows and of positions in a row; a copy comes first.
  const int32_t* top = s.free_pages + s.status->num_free;
  int64_t* slot = p.slots;
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t q_len = p.q_lens ? p.q_lens[i] : 1, len = s.seq_lens[p.rows[i]];
    int32_t* row = s.page_table + p.rows[i] * s.max_pages;
    if (copied[i]) {
      int32_t& last = row[len / s.page_size];
      copies.src.push_back(last);
      --s.refcount[last];
      last = *--top;
      s.refcount[last] = 1;
      copies.dst.push_back(last);
      copies.num_tokens.push_back(static_cast<int32_t>(len % s.page_size));
    }
    const int64_t end = len + q_len;
    for (int64_t pos = len; pos < end;) {
      const int64_t j = pos / s.page_size, offset = pos % s.page_size;
      if (offset == 0) {
        row[j] = *--top;
        s.refcount[row[j]] = 1;
      }
      const int64_t stop = std::min(end, (j + 1) * s.page_size);
      const int64_t base = row[j] * s.page_size - j * s.page_size;
      for (; pos < stop; ++pos) *slot++ = base + pos;
    }
    s.seq_lens[p.rows[i]] = static_cast<int32_t>(end);
  }
  std::fill_n(slot, p.num_slots - num_slots, int64_t{-1});
  s.status->num_free -= static_cast<int32_t>(num_needed);
  s.status->peak_used = std::max(s.status->peak_used, static_cast<int32_t>(s.num_pages) - s.status->num_free);
  return {};
}

Fault hold_pages(const PageState& s, const int32_t* pages, int64_t n, bool hold) {
  for (int64_t i = 0; i < n; ++i) {
    if (pages[i] < 0 || pages[i] >= s.num_pages) return {"pages", "page ids in 0 ..", s.num_pages - 1, pages[i], i};
  }
  Marks drops(s.num_pages);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t refcount = s.refcount[pages[i]];
    if (hold && refcount < 1) return {"pages", "pages in use, none with refcount", refcount, pages[i], i};
    if (!hold && refcount <= drops.add(pages[i])) {
      return {"pages", "no page more often than its references, which are", refcount, pages[i], i};
    }
  }
  if (s.status->error) return {};
  for (int64_t i = 0; i < n; ++i) {
    if (hold) ++s.refcount[pages[i]];
    else drop_reference(s, pages[i]);
  }
  return {};
}

Fault adopt_pages(const PageState& s, int64_t row, const int32_t* pages, int64_t n, int64_t num_tokens) {
  if (s.seq_lens[row] != 0) return {"row", "an empty row: length", 0, s.seq_lens[row], 0};
  if (s.status->error) return {};
  if (Fault f = hold_pages(s, pages, n, true); f.argument) return f;
  std::copy_n(pages, n, s.page_table + row * s.max_pages);
  s.seq_lens[row] = static_cast<int32_t>(num_tokens);
  return {};
}

void copy_pages(const CopyPagesParams& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / p.n, i = item % p.n;
    if (p.dst[i] < 0) continue;
    char* base = p.kv + (plane / 2) * p.stride_bytes.layer + (plane % 2) * p.stride_bytes.kv;
    const char* from = base + p.src[i] * p.stride_bytes.page;
    char* to = base + p.dst[i] * p.stride_bytes.page;
    const int64_t bytes = p.num_tokens ? p.num_tokens[i] * p.token_bytes : p.head_bytes;
    if (bytes == p.head_bytes) {
      std::memcpy(to, from, static_cast<size_t>(bytes * p.num_kv_heads));
      continue;
    }
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      std::memcpy(to + h * p.head_bytes, from + h * p.head_bytes, static_cast<size_t>(bytes));
    }
  }
}

}  // namespace treedecode::cpu
