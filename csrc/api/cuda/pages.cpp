// fork_branches, append_slots, hold_pages, adopt_pages, copy_pages.
#include "../../cuda/pages/pages.h"

#include <optional>

#include "../../cuda/pages/copy_pages.h"
#include "../pages_args.h"
#include "device.h"

namespace treedecode {
namespace {

const Tensor* optional(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

void fork_branches_cuda(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status,
                        Tensor src, Tensor dst, std::optional<Tensor> lens, int64_t page_size) {
  cuda::ForkParams p{};
  p.state = page_state<cuda::PageState>(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  p.src = indices(src, "src", "[n]", -1);
  p.n = src.size(0);
  p.dst = indices(dst, "dst", "the shape of src", p.n);
  p.lens = indices(lens, "lens", "the shape of src", p.n);
  check_device({{&refcount, "refcount"},
                {&free_pages, "free_pages"},
                {&page_table, "page_table"},
                {&seq_lens, "seq_lens"},
                {&status, "status"},
                {&src, "src"},
                {&dst, "dst"},
                {optional(lens), "lens"}});
  const DeviceGuard guard(refcount.get_device_index());
  Scratch scratch;
  scratch.add(&p.last_drops, p.state.num_pages);
  scratch.add(&p.row_marks, p.state.max_branches);
  scratch.add(&p.new_rows, p.n * p.state.max_pages);
  scratch.add(&p.new_lens, p.n);
  scratch.add(&p.num_freed, p.n);
  const Tensor memory = scratch.allocate(refcount);
  check_launch(cuda::fork_branches(p, current_stream(refcount)), "fork_branches");
}

void append_slots_cuda(Tensor refcount, Tensor free_pages, Tensor page_table, Tensor seq_lens, Tensor status, Tensor kv,
                       Tensor slots, Tensor rows, std::optional<Tensor> q_lens, int64_t page_size) {
  cuda::AppendParams p{};
  p.state = page_state<cuda::PageState>(refcount, &free_pages, &page_table, &seq_lens, status, page_size);
  check_slots(slots, kv, p.state.num_pages, page_size);
  p.rows = indices(rows, "rows", "[n]", -1);
  p.n = rows.size(0);
  p.q_lens = indices(q_lens, "q_lens", "the shape of rows", p.n);
  check_device({{&refcount, "refcount"},
                {&free_pages, "free_pages"},
                {&page_table, "page_table"},
                {&seq_lens, "seq_lens"},
                {&status, "status"},
                {&kv, "kv"},
                {&slots, "slots"},
                {&rows, "rows"},
                {optional(q_lens), "q_lens"}});
  p.slots = slots.mutable_data_ptr<int64_t>();
  p.num_slots = slots.size(0);
  const DeviceGuard guard(refcount.get_device_index());
  Scratch scratch;
  for (int32_t** copies : {&p.copy_src, &p.copy_dst, &p.copy_tokens}) scratch.add(copies, p.n);
  scratch.add(&p.num_copies, 1);
  scratch.add(&p.first_slots, p.n);
  scratch.add(&p.first_pages, p.n);
  scratch.add(&p.copies, p.n);
  scratch.add(&p.row_marks, p.state.max_branches);
  scratch.add(&p.num_sharers, p.state.num_pages);
  scratch.add(&p.last_sharers, p.state.num_pages);
  const Tensor memory = scratch.allocate(refcount);
  const cudaStream_t stream = current_stream(refcount);
  check_launch(cuda::append_slots(p, stream), "append_slots");
  if (page_size == 1) return;  // a page of one token is never partial
  auto copies = copy_params<cuda::CopyPagesParams>(kv, p.copy_src, p.copy_dst, p.copy_tokens, p.n);
  copies.num_copies = p.num_copies;
  copies.num_pages = p.state.num_pages;
  copies.page_size = page_size;
  check_launch(cuda::copy_pages(copies, stream), "append_slots");
}

void hold_pages_cuda(Tensor refcount, Tensor free_pages, Tensor status, Tensor pages, bool hold) {
  cuda::HoldParams p{};
  p.state = page_state<cuda::PageState>(refcount, &free_pages, nullptr, nullptr, status, 1);
  p.pages = indices(pages, "pages", "[n]", -1);
  p.n = pages.size(0);
  p.hold = hold;
  check_device({{&refcount, "refcount"}, {&free_pages, "free_pages"}, {&status, "status"}, {&pages, "pages"}});
  const DeviceGuard guard(refcount.get_device_index());
  Scratch scratch;
  scratch.add(&p.num_drops, p.state.num_pages);
  scratch.add(&p.last_drops, p.state.num_pages);
  const Tensor memory = scratch.allocate(refcount);
  check_launch(cuda::hold_pages(p, current_stream(refcount)), "hold_pages");
}

void adopt_pages_cuda(Tensor refcount, Tensor page_table, Tensor seq_lens, Tensor status, Tensor pages, int64_t row,
                      int64_t num_tokens, int64_t page_size) {
  cuda::AdoptParams p{};
  p.state = page_state<cuda::PageState>(refcount, nullptr, &page_table, &seq_lens, status, page_size);
  p.pages = indices(pages, "pages", "[n]", -1);
  p.n = pages.size(0);
  p.row = row;
  p.num_tokens = num_tokens;
  check_adopt(p.state, row, p.n, num_tokens);
  check_device({{&refcount, "refcount"},
                {&page_table, "page_table"},
                {&seq_lens, "seq_lens"},
                {&status, "status"},
                {&pages, "pages"}});
  const DeviceGuard guard(refcount.get_device_index());
  check_launch(cuda::adopt_pages(p, current_stream(refcount)), "adopt_pages");
}

void copy_pages_cuda(Tensor kv, Tensor src, Tensor dst, std::optional<Tensor> num_tokens) {
  auto p = check_copy_pages<cuda::CopyPagesParams>(kv, src, dst, num_tokens);
  check_device({{&kv, "kv"}, {&src, "src"}, {&dst, "dst"}, {optional(num_tokens), "num_tokens"}});
  p.num_pages = kv.size(2);
  p.page_size = kv.size(4);
  const DeviceGuard guard(kv.get_device_index());
  check_launch(cuda::copy_pages(p, current_stream(kv)), "copy_pages");
}

}  // namespace

TD_CUDA_OPS(m) {
  m.impl("fork_branches", TORCH_BOX(&fork_branches_cuda));
  m.impl("append_slots", TORCH_BOX(&append_slots_cuda));
  m.impl("hold_pages", TORCH_BOX(&hold_pages_cuda));
  m.impl("adopt_pages", TORCH_BOX(&adopt_pages_cuda));
  m.impl("copy_pages", TORCH_BOX(&copy_pages_cuda));
}

}  // namespace treedecode
