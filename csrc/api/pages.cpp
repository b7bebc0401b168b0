// fork_branches, append_slots, hold_pages, adopt_pages, copy_pages.
#include "../cpu/pages.h"

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"

namespace treedecode {
namespace {

int32_t* state_tensor(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Int);
  check_contiguous(t, name);
  return t.mutable_data_ptr<int32_t>();
}

const int32_t* indices(const Tensor& t, const char* name, const char* shape, int64_t n) {
  check_shape(t, name, shape, {n});
  check_dtype(t, name, ScalarType::Int);
  check_contiguous(t, name);
  return t.const_data_ptr<int32_t>();
}

cpu::PageState page_state(const Tensor& refcount, const Tensor* free_pages, const Tensor* page_table,
                          const Tensor* seq_lens, const Tensor& status, int64_t page_size) {
  check_shape(refcount, "refcount", "[num_pages]", {-1});
  check_shape(status, "status", "[4]", {cpu::kStatusSize});
  check_value(page_size >= 1 && page_size <= INT32_MAX, "page_size", "1 to 2^31 - 1", static_cast<double>(page_size));
  cpu::PageState s{};
  s.refcount = state_tensor(refcount, "refcount");
  s.status = state_tensor(status, "status");
  s.num_pages = refcount.size(0);
  s.page_size = page_size;
  const int32_t num_free = s.status[cpu::kNumFree];
  STD_TORCH_CHECK(num_free >= 0 && num_free <= s.num_pages, "[ValueError] status: expected num_free in 0 .. ",
                  s.num_pages, ", got ", num_free);
  if (free_pages) {
    check_shape(*free_pages, "free_pages", "[num_pages]", {s.num_pages});
    s.free_pages = state_tensor(*free_pages, "free_pages");
  }
  if (page_table) {
    check_shape(*page_table, "page_table", "[max_branches, max_pages]", {-1, -1});
    s.page_table = state_tensor(*page_table, "page_table");
    s.max_branches = page_table->size(0);
    s.max_pages = page_table->size(1);
    check_shape(*seq_lens, "seq_lens", "[max_branches]", {s.max_branches});
    s.seq_lens = state_tensor(*seq_lens, "seq_lens");
  }
  return s;
}

void raise(const cpu::Fault& f) {
  STD_TORCH_CHECK(!f.argument, "[ValueError] ", f.argument, ": expected ", f.expected, " ", f.limit, ", got ", f.got,
                  " at index ", f.index);
}

void check_kv(const Tensor& kv, int64_t page_size) {
  check_shape(kv, "kv", "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]",
              {-1, 2, -1, -1, page_size, -1});
  const bool page_contiguous =
      kv.stride(5) == 1 && kv.stride(4) == kv.size(5) && kv.stride(3) == kv.size(4) * kv.size(5);
  STD_TORCH_CHECK(page_contiguous || kv.numel() == 0,
                  "[ValueError] kv: expected each page's [num_kv_heads, page_size, "
                  "head_dim] to be contiguous");
}

void run_copies(const Tensor& kv, const int32_t* src, const int32_t* dst, const int32_t* num_tokens, int64_t n) {
  if (n == 0 || kv.numel() == 0) return;
  const auto size = static_cast<int64_t>(kv.element_size());
  const cpu::CopyPagesParams p{
      static_cast<char*>(kv.mutable_data_ptr()),
      src,
      dst,
      num_tokens,
      n,
      kv.size(0) * 2,
      kv.size(3),
      kv.size(4) * kv.size(5) * size,
      kv.size(5) * size,
      {kv.stride(0) * size, kv.stride(1) * size, kv.stride(2) * size},
  };
  const int64_t page_bytes = p.num_kv_heads * p.head_bytes;
  const int64_t grain = std::max<int64_t>(
      1, (512 << 10) / std::max<int64_t>(1, page_bytes));  // 512 KiB a task: below, waking a thread costs more
  torch::stable::parallel_for(0, p.num_planes * n, grain,
                              [&](int64_t begin, int64_t end) { cpu::copy_pages(p, begin, end); });
}

void fork_branches_cpu(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status,
                       Tensor src, Tensor dst, std::optional<Tensor> lens, int64_t page_size) {
  const cpu::PageState s = page_state(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  const int32_t* from = indices(src, "src", "[n]", -1);
  const int64_t n = src.size(0);
  raise(cpu::fork_branches(s, {from, indices(dst, "dst", "the shape of src", n),
                               lens ? indices(*lens, "lens", "the shape of src", n) : nullptr, n}));
}

void append_slots_cpu(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status, Tensor kv,
                      Tensor slots, Tensor rows, std::optional<Tensor> q_lens, int64_t page_size) {
  const cpu::PageState s = page_state(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  check_kv(kv, page_size);
  STD_TORCH_CHECK(kv.size(2) == s.num_pages, "[ValueError] kv: expected num_pages = ", s.num_pages, ", got ",
                  kv.size(2));
  check_shape(slots, "slots", "[num_slots]", {-1});
  check_dtype(slots, "slots", ScalarType::Long);
  check_contiguous(slots, "slots");
  const int32_t* row = indices(rows, "rows", "[n]", -1);
  const int64_t n = rows.size(0);
  thread_local cpu::PageCopies copies;
  raise(cpu::append_slots(s,
                          {row, q_lens ? indices(*q_lens, "q_lens", "the shape of rows", n) : nullptr,
                           slots.mutable_data_ptr<int64_t>(), n, slots.size(0)},
                          copies));
  run_copies(kv, copies.src.data(), copies.dst.data(), copies.num_tokens.data(),
             static_cast<int64_t>(copies.src.size()));
}

void hold_pages_cpu(Tensor refcount, Tensor free_pages, Tensor status, Tensor pages, bool hold) {
  const cpu::PageState s = page_state(refcount, &free_pages, nullptr, nullptr, status, 1);
  const int32_t* ids = indices(pages, "pages", "[n]", -1);
  raise(cpu::hold_pages(s, ids, pages.size(0), hold));
}

void adopt_pages_cpu(Tensor refcount, Tensor page_table, Tensor seq_lens, Tensor status, Tensor pages, int64_t row,
                     int64_t num_tokens, int64_t page_size) {
  const cpu::PageState s = page_state(refcount, nullptr, &page_table, &seq_lens, status, page_size);
  const int32_t* ids = indices(pages, "pages", "[n]", -1);
  raise(cpu::adopt_pages(s, row, ids, pages.size(0), num_tokens));
}

void copy_pages_cpu(Tensor kv, Tensor src, Tensor dst, std::optional<Tensor> num_tokens) {
  check_shape(kv, "kv", "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]", {-1, 2, -1, -1, -1, -1});
  check_kv(kv, kv.size(4));
  const int32_t* from = indices(src, "src", "[n]", -1);
  const int64_t n = src.size(0), num_pages = kv.size(2);
  const int32_t* to = indices(dst, "dst", "the shape of src", n);
  const int32_t* lens = num_tokens ? indices(*num_tokens, "num_tokens", "the shape of src", n) : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    if (to[i] < 0) continue;
    const char* expected = "page ids in 0 ..";
    if (to[i] >= num_pages) raise({"dst", expected, num_pages - 1, to[i], i});
    if (from[i] < 0 || from[i] >= num_pages) raise({"src", expected, num_pages - 1, from[i], i});
    if (lens && (lens[i] < 0 || lens[i] > kv.size(4))) raise({"num_tokens", "lengths in 0 ..", kv.size(4), lens[i], i});
  }
  run_copies(kv, from, to, lens, n);
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
