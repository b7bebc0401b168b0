// fork_branches, append_slots, hold_pages, adopt_pages, copy_pages.
#include "../cpu/pages.h"

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "pages_args.h"
#include "parallel.h"

namespace treedecode {
namespace {

cpu::PageState cpu_state(const Tensor& refcount, const Tensor* free_pages, const Tensor* page_table,
                         const Tensor* seq_lens, const Tensor& status, int64_t page_size) {
  const auto s = page_state<cpu::PageState>(refcount, free_pages, page_table, seq_lens, status, page_size);
  const int32_t num_free = s.status->num_free;
  STD_TORCH_CHECK(num_free >= 0 && num_free <= s.num_pages, "[ValueError] status: expected num_free in 0 .. ",
                  s.num_pages, ", got ", num_free);
  return s;
}

void raise(const cpu::Fault& f) {
  STD_TORCH_CHECK(!f.argument, "[ValueError] ", f.argument, ": expected ", f.expected, " ", f.limit, ", got ", f.got,
                  " at index ", f.index);
}

void run_copies(const cpu::CopyPagesParams& p) {
  if (p.n == 0 || p.num_planes * p.num_kv_heads * p.head_bytes == 0) return;
  const int64_t page_bytes = p.num_kv_heads * p.head_bytes;
  const int64_t grain = std::max<int64_t>(
      1, (512 << 10) / std::max<int64_t>(1, page_bytes));  // 512 KiB a task: below, waking a thread costs more
  parallel_for(0, p.num_planes * p.n, grain, [&](int64_t begin, int64_t end) { cpu::copy_pages(p, begin, end); });
}

void fork_branches_cpu(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status,
                       Tensor src, Tensor dst, std::optional<Tensor> lens, int64_t page_size) {
  const cpu::PageState s = cpu_state(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  const int32_t* from = indices(src, "src", "[n]", -1);
  const int64_t n = src.size(0);
  raise(cpu::fork_branches(
      s, {from, indices(dst, "dst", "the shape of src", n), indices(lens, "lens", "the shape of src", n), n}));
}

void append_slots_cpu(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status, Tensor kv,
                      Tensor slots, Tensor rows, std::optional<Tensor> q_lens, int64_t page_size) {
  const cpu::PageState s = cpu_state(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  check_slots(slots, kv, s.num_pages, page_size);
  const int32_t* row = indices(rows, "rows", "[n]", -1);
  const int64_t n = rows.size(0);
  thread_local cpu::PageCopies copies;
  raise(cpu::append_slots(
      s, {row, indices(q_lens, "q_lens", "the shape of rows", n), slots.mutable_data_ptr<int64_t>(), n, slots.size(0)},
      copies));
  run_copies(copy_params<cpu::CopyPagesParams>(kv, copies.src.data(), copies.dst.data(), copies.num_tokens.data(),
                                               static_cast<int64_t>(copies.src.size())));
}

void hold_pages_cpu(Tensor refcount, Tensor free_pages, Tensor status, Tensor pages, bool hold) {
  const cpu::PageState s = cpu_state(refcount, &free_pages, nullptr, nullptr, status, 1);
  const int32_t* ids = indices(pages, "pages", "[n]", -1);
  raise(cpu::hold_pages(s, ids, pages.size(0), hold));
}

void adopt_pages_cpu(Tensor refcount, Tensor page_table, Tensor seq_lens, Tensor status, Tensor pages, int64_t row,
                     int64_t num_tokens, int64_t page_size) {
  const cpu::PageState s = cpu_state(refcount, nullptr, &page_table, &seq_lens, status, page_size);
  const int32_t* ids = indices(pages, "pages", "[n]", -1);
  check_adopt(s, row, pages.size(0), num_tokens);
  raise(cpu::adopt_pages(s, row, ids, pages.size(0), num_tokens));
}

void copy_pages_cpu(Tensor kv, Tensor src, Tensor dst, std::optional<Tensor> num_tokens) {
  const auto p = check_copy_pages<cpu::CopyPagesParams>(kv, src, dst, num_tokens);
  const int64_t num_pages = kv.size(2), page_size = kv.size(4);
  for (int64_t i = 0; i < p.n; ++i) {
    if (p.dst[i] < 0) continue;
    const char* expected = "page ids in 0 ..";
    if (p.dst[i] >= num_pages) raise({"dst", expected, num_pages - 1, p.dst[i], i});
    if (p.src[i] < 0 || p.src[i] >= num_pages) raise({"src", expected, num_pages - 1, p.src[i], i});
    if (p.num_tokens && (p.num_tokens[i] < 0 || p.num_tokens[i] > page_size)) {
      raise({"num_tokens", "lengths in 0 ..", page_size, p.num_tokens[i], i});
    }
  }
  run_copies(p);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) {
  m.impl("fork_branches", TORCH_BOX(&fork_branches_cpu));
  m.impl("append_slots", TORCH_BOX(&append_slots_cpu));
  m.impl("hold_pages", TORCH_BOX(&hold_pages_cpu));
  m.impl("adopt_pages", TORCH_BOX(&adopt_pages_cpu));
  m.impl("copy_pages", TORCH_BOX(&copy_pages_cpu));
}

}  // namespace treedecode
