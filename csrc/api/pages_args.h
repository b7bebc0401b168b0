// Argument checks of the page ops, the same on every device. They do not read the values of tensors.
#pragma once

#include <optional>

#include "../check.h"
#include "../cpu/page_status.h"

namespace treedecode {

inline int32_t* state_tensor(const Tensor& t, const char* name) {
  check_dtype(t, name, ScalarType::Int);
  check_contiguous(t, name);
  return t.mutable_data_ptr<int32_t>();
}

inline const int32_t* indices(const Tensor& t, const char* name, const char* shape, int64_t n) {
  check_shape(t, name, shape, {n});
  check_dtype(t, name, ScalarType::Int);
  check_contiguous(t, name);
  return t.const_data_ptr<int32_t>();
}

inline const int32_t* indices(const std::optional<Tensor>& t, const char* name, const char* shape, int64_t n) {
  return t ? indices(*t, name, shape, n) : nullptr;
}

// Returns the page state as the struct State of a backend. An op that uses no free pages or no table gives nullptr.
template <typename State>
State page_state(const Tensor& refcount, const Tensor* free_pages, const Tensor* page_table, const Tensor* seq_lens,
                 const Tensor& status, int64_t page_size) {
  check_shape(refcount, "refcount", "[num_pages]", {-1});
  check_shape(status, "status", "[4]", {kStatusSize});
  check_value(page_size >= 1 && page_size <= INT32_MAX, "page_size", "1 to 2^31 - 1", static_cast<double>(page_size));
  State s{};
  s.refcount = state_tensor(refcount, "refcount");
  s.status = reinterpret_cast<PageStatus*>(state_tensor(status, "status"));
  s.num_pages = refcount.size(0);
  s.page_size = page_size;
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

inline void check_kv(const Tensor& kv, int64_t page_size) {
  check_shape(kv, "kv", "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]",
              {-1, 2, -1, -1, page_size, -1});
  const bool page_contiguous =
      kv.stride(5) == 1 && kv.stride(4) == kv.size(5) && kv.stride(3) == kv.size(4) * kv.size(5);
  STD_TORCH_CHECK(page_contiguous || kv.numel() == 0,
                  "[ValueError] kv: expected each page's [num_kv_heads, page_size, "
                  "head_dim] to be contiguous");
}

inline void check_slots(const Tensor& slots, const Tensor& kv, int64_t num_pages, int64_t page_size) {
  check_kv(kv, page_size);
  STD_TORCH_CHECK(kv.size(2) == num_pages, "[ValueError] kv: expected num_pages = ", num_pages, ", got ", kv.size(2));
  check_shape(slots, "slots", "[num_slots]", {-1});
  check_dtype(slots, "slots", ScalarType::Long);
  check_contiguous(slots, "slots");
}

// Checks `row` and `num_tokens`, which are numbers, so that every device can check them.
template <typename State>
void check_adopt(const State& s, int64_t row, int64_t num_pages, int64_t num_tokens) {
  STD_TORCH_CHECK(row >= 0 && row < s.max_branches, "[ValueError] row: expected a row in 0 .. ", s.max_branches - 1,
                  ", got ", row);
  STD_TORCH_CHECK(num_pages <= s.max_pages, "[ValueError] pages: expected at most as many as a row holds, ",
                  s.max_pages, ", got ", num_pages);
  const int64_t limit = num_pages * s.page_size;
  STD_TORCH_CHECK(num_tokens <= limit && (num_pages > 0 ? num_tokens > limit - s.page_size : num_tokens == 0),
                  "[ValueError] num_tokens: expected a length that ends in the last page, at most ", limit, ", got ",
                  num_tokens);
}

// Sets the params of copy_pages that all backends have.
template <typename Params>
Params copy_params(const Tensor& kv, const int32_t* src, const int32_t* dst, const int32_t* num_tokens, int64_t n) {
  const auto size = static_cast<int64_t>(kv.element_size());
  Params p{};
  p.kv = static_cast<char*>(kv.mutable_data_ptr());
  p.src = src;
  p.dst = dst;
  p.num_tokens = num_tokens;
  p.n = n;
  p.num_planes = kv.size(0) * 2;
  p.num_kv_heads = kv.size(3);
  p.head_bytes = kv.size(4) * kv.size(5) * size;
  p.token_bytes = kv.size(5) * size;
  p.stride_bytes = {kv.stride(0) * size, kv.stride(1) * size, kv.stride(2) * size};
  return p;
}

// Checks the arguments of copy_pages.
template <typename Params>
Params check_copy_pages(const Tensor& kv, const Tensor& src, const Tensor& dst,
                        const std::optional<Tensor>& num_tokens) {
  check_shape(kv, "kv", "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]", {-1, 2, -1, -1, -1, -1});
  check_kv(kv, kv.size(4));
  const int32_t* from = indices(src, "src", "[n]", -1);
  const int64_t n = src.size(0);
  const int32_t* to = indices(dst, "dst", "the shape of src", n);
  return copy_params<Params>(kv, from, to, indices(num_tokens, "num_tokens", "the shape of src", n), n);
}

}  // namespace treedecode
