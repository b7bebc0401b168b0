// decoder_forward: runs all layers of a decoder, its last norm and its language model head in one call. It calls the
// kernels of the single ops in their order, so the results are the same to the last bit.
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "decoder_forward_args.h"
#include "kernel_dtype.h"
#include "launch.h"
#include "parallel.h"
#include "tree_attention_args.h"

namespace treedecode {
namespace {

// Allocates the buffers of the layers in one block of memory. Without a base it only counts their bytes.
class Scratch {
 public:
  char* take(int64_t bytes) {
    const int64_t begin = size_;
    size_ += (bytes + 63) / 64 * 64;
    return base_ ? base_ + begin : nullptr;
  }
  void rewind(void* base) {
    base_ = static_cast<char*>(base);
    size_ = 0;
  }
  int64_t size() const { return size_; }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0;
};

struct Buffers {
  char *x, *normed, *qkv, *q_normed, *k_normed, *mixed, *act, *packed;

  Buffers(Scratch& scratch, const Sizes& s, int64_t widest) {
    const int64_t row = s.num_tokens * s.element_size;
    x = scratch.take(row * s.hidden_size);
    normed = scratch.take(row * s.hidden_size);
    qkv = scratch.take(row * s.num_heads() * s.head_dim);
    q_normed = scratch.take(row * s.num_qo_heads * s.head_dim);
    k_normed = scratch.take(row * s.num_kv_heads * s.head_dim);
    mixed = scratch.take(row * s.num_qo_heads * s.head_dim);
    act = scratch.take(row * s.intermediate_size);
    const int64_t blocks = (s.num_tokens + cpu::kRowBlock - 1) / cpu::kRowBlock;
    packed = scratch.take(4 * blocks * cpu::kRowBlock * widest);
  }
};

class Forward {
 public:
  Forward(const Sizes& s, const Buffers& b, double eps, bool unit_offset)
      : s_(s), b_(b), eps_(static_cast<float>(eps)), unit_offset_(unit_offset) {}

  void norm(const void* x, const void* weight, void* out, int64_t rows, int64_t heads, int64_t size, int64_t row_stride,
            int64_t head_stride) const {
    launch(cpu::RmsNormParams{x, weight, out, heads, size, {row_stride, head_stride}, eps_, unit_offset_, s_.dtype},
           rows);
  }

  void norm(const void* x, const void* weight, void* out, int64_t rows) const {
    norm(x, weight, out, rows, 1, s_.hidden_size, s_.hidden_size, s_.hidden_size);
  }

  void linear(const Linear& l, const void* x, const void* residual, void* out, int64_t rows) const {
    launch(cpu::PackedLinearParams{x, l.weight, l.bias, residual, out, b_.packed, rows, l.in_features, l.out_features,
                                   l.in_features, l.out_features, l.gate, s_.dtype});
  }

 private:
  const Sizes& s_;
  const Buffers& b_;
  float eps_;
  bool unit_offset_;
};

std::tuple<Tensor, Tensor> decoder_forward_cpu(Tensor x, Tensor cos, Tensor sin, Tensor kv, Tensor slots,
                                               Tensor page_table, Tensor seq_lens, Tensor q_indptr, Tensor part_indptr,
                                               Tensor chunks, Tensor counts, Tensor order, Tensor row_indptr,
                                               Tensor logit_rows, std::vector<Tensor> weights,
                                               std::vector<double> sm_scales, std::vector<double> soft_caps,
                                               std::vector<int64_t> windows, double eps, bool unit_offset,
                                               std::string gate_name, int64_t num_qo_heads, int64_t intermediate_size,
                                               int64_t vocab_size) {
  // Arguments.

  check_shape(x, "x", "[num_tokens, hidden_size]", {-1, -1});
  check_float_dtype(x, "x");
  check_contiguous(x, "x");
  check_shape(kv, "kv", "[num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]", {-1, 2, -1, -1, -1, -1});
  check_dtype(kv, "kv", x.scalar_type());
  check_unit_stride(kv, "kv");
  const int64_t num_layers = kv.size(0), num_pages = kv.size(2), page_size = kv.size(4);
  const Sizes s{x.size(0),       x.size(1),       num_qo_heads,
                kv.size(3),      kv.size(5),      intermediate_size,
                x.scalar_type(), kernel_dtype(x), static_cast<int64_t>(x.element_size())};
  check_value(cpu::is_head_dim(s.head_dim), "kv", "head_dim a multiple of 8 up to 256",
              static_cast<double>(s.head_dim));
  check_value(page_size > 0, "kv", "page_size above 0", static_cast<double>(page_size));
  check_value(s.num_kv_heads > 0 && num_qo_heads > 0 && num_qo_heads % s.num_kv_heads == 0, "num_qo_heads",
              "a positive multiple of num_kv_heads", static_cast<double>(num_qo_heads));
  // Products of sizes stay within int64.
  for (const auto& [size, name] : {std::pair{num_qo_heads, "num_qo_heads"},
                                   {intermediate_size, "intermediate_size"},
                                   {vocab_size, "vocab_size"}}) {
    check_value(size > 0 && size <= std::numeric_limits<int32_t>::max(), name,
                "a positive number of the range of int32", static_cast<double>(size));
  }
  check_value(eps >= 0, "eps", "a non-negative number", eps);
  for (const auto& [t, name] : {std::pair{&cos, "cos"}, {&sin, "sin"}}) {
    check_shape(*t, name, "[num_tokens, head_dim]", {s.num_tokens, s.head_dim});
    check_dtype(*t, name, x.scalar_type());
    check_unit_stride(*t, name);
  }
  check_shape(slots, "slots", "[num_tokens]", {s.num_tokens});
  check_dtype(slots, "slots", ScalarType::Long);
  check_contiguous(slots, "slots");
  check_slots(slots.const_data_ptr<int64_t>(), s.num_tokens, num_pages * page_size);
  check_shape(logit_rows, "logit_rows", "[num_logits]", {-1});
  check_dtype(logit_rows, "logit_rows", ScalarType::Long);
  check_contiguous(logit_rows, "logit_rows");
  const int64_t num_logits = logit_rows.size(0);
  const int64_t* row = logit_rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num_logits; ++i) {
    check_value(row[i] >= 0 && row[i] < s.num_tokens, "logit_rows", "numbers of tokens of x",
                static_cast<double>(row[i]));
  }
  check_plan_tensors(page_table, seq_lens, q_indptr, part_indptr, chunks, counts, order, row_indptr);
  const int64_t expected = num_layers * kLayerTensors + kHeadTensors;
  check_value(static_cast<int64_t>(weights.size()) == expected, "weights",
              "13 tensors per layer of kv and 3 of the head, " + std::to_string(expected) + " in all",
              static_cast<double>(weights.size()));
  for (const auto& [size, name] :
       {std::pair{sm_scales.size(), "sm_scales"}, {soft_caps.size(), "soft_caps"}, {windows.size(), "windows"}}) {
    check_value(static_cast<int64_t>(size) == num_layers, name, "one number per layer of kv",
                static_cast<double>(size));
  }

  STD_TORCH_CHECK(gate_name == "silu" || gate_name == "gelu_tanh",
                  "[ValueError] gate: expected 'silu' or 'gelu_tanh', got '", gate_name, "'");
  const cpu::Gate gate = gate_of(gate_name);
  std::vector<Layer> layers;
  int64_t widest = std::max({s.hidden_size, num_qo_heads * s.head_dim, intermediate_size});
  for (int64_t i = 0; i < num_layers; ++i) {
    const auto n = static_cast<size_t>(i);
    check_attention_numbers(sm_scales[n], windows[n], soft_caps[n], {"sm_scales", "windows", "soft_caps"});
    const std::string prefix = "weights of layer " + std::to_string(i) + ": ";
    const Tensors t(weights, i * kLayerTensors, kLayerNames, prefix.c_str(), x.scalar_type());
    layers.push_back(layer_of(t, s, gate, sm_scales[n], soft_caps[n], windows[n]));
  }
  const Tensors head(weights, num_layers * kLayerTensors, kHeadNames, "weights: ", x.scalar_type());
  const void* final_norm = head.vector(kFinalNorm, s.hidden_size);
  const Linear lm_head = head.linear(kLmHead, kLmHeadBias, s.hidden_size, vocab_size);

  const int64_t width = s.num_heads() * s.head_dim;
  cpu::TreeAttentionParams attention{
      .q = nullptr,
      .k_pages = nullptr,
      .v_pages = nullptr,
      .page_table = page_table.const_data_ptr<int32_t>(),
      .seq_lens = seq_lens.const_data_ptr<int32_t>(),
      .q_indptr = q_indptr.const_data_ptr<int32_t>(),
      .part_indptr = part_indptr.const_data_ptr<int32_t>(),
      .order = order.const_data_ptr<int32_t>(),
      .row_indptr = row_indptr.const_data_ptr<int32_t>(),
      .chunks = rows_of<cpu::ChainedChunk>(chunks),
      .sinks = nullptr,
      .out = nullptr,
      .lse = nullptr,
      .parts = nullptr,
      .num_rows = page_table.size(0),
      .num_qo_heads = num_qo_heads,
      .num_kv_heads = s.num_kv_heads,
      .head_dim = s.head_dim,
      .page_size = page_size,
      .page_table_stride = page_table.stride(0),
      .q_stride = {0, s.head_dim},
      .k_stride = {kv.stride(2), kv.stride(4), kv.stride(3)},
      .v_stride = {kv.stride(2), kv.stride(4), kv.stride(3)},
      .sm_scale = 1.0f,
      .soft_cap = 0.0f,
      .window_left = -1,
      .dtype = s.dtype,
  };
  check_plan(attention, s.num_tokens, num_pages, page_table.size(1), chunks.size(0), *rows_of<cpu::PlanCounts>(counts));

  // Layers.

  Tensor hidden = torch::stable::new_empty(x, {num_logits, s.hidden_size});
  Tensor logits = torch::stable::new_empty(x, {num_logits, vocab_size});
  if (s.num_tokens == 0) return {logits, hidden};
  choose_threads(Threads::Team);
  Scratch scratch;
  Buffers(scratch, s, widest);
  Tensor memory = torch::stable::new_empty(x, {scratch.size() + 64}, ScalarType::Byte);
  const auto base = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  scratch.rewind(reinterpret_cast<void*>((base + 63) / 64 * 64));
  const Buffers b(scratch, s, widest);
  const Forward run(s, b, eps, unit_offset);
  attention.out = b.mixed;

  const void* in = x.const_data_ptr();
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& layer = layers[static_cast<size_t>(i)];
    run.norm(in, layer.input_norm, b.normed, s.num_tokens);
    run.linear(layer.qkv, b.normed, nullptr, b.qkv, s.num_tokens);
    char* q = b.qkv;
    char* k = q + num_qo_heads * s.head_dim * s.element_size;
    char* v = k + s.num_kv_heads * s.head_dim * s.element_size;
    int64_t q_stride = width, k_stride = width;
    if (layer.q_norm != nullptr) {
      run.norm(q, layer.q_norm, b.q_normed, s.num_tokens, num_qo_heads, s.head_dim, width, s.head_dim);
      run.norm(k, layer.k_norm, b.k_normed, s.num_tokens, s.num_kv_heads, s.head_dim, width, s.head_dim);
      q = b.q_normed, k = b.k_normed;
      q_stride = num_qo_heads * s.head_dim, k_stride = s.num_kv_heads * s.head_dim;
    }
    launch(cpu::RotaryEmbedParams{q,
                                  k,
                                  cos.const_data_ptr(),
                                  sin.const_data_ptr(),
                                  num_qo_heads,
                                  s.num_kv_heads,
                                  s.head_dim,
                                  {q_stride, s.head_dim},
                                  {k_stride, s.head_dim},
                                  cos.stride(0),
                                  sin.stride(0),
                                  s.dtype},
           s.num_tokens);
    char* k_pages = static_cast<char*>(kv.mutable_data_ptr()) + i * kv.stride(0) * s.element_size;
    char* v_pages = k_pages + kv.stride(1) * s.element_size;
    launch(cpu::AppendKvParams{k,
                               v,
                               k_pages,
                               v_pages,
                               slots.const_data_ptr<int64_t>(),
                               s.num_tokens,
                               s.num_kv_heads,
                               s.head_dim,
                               page_size,
                               s.element_size,
                               {k_stride, s.head_dim},
                               {width, s.head_dim},
                               {kv.stride(2), kv.stride(4), kv.stride(3)},
                               {kv.stride(2), kv.stride(4), kv.stride(3)}});
    attention.q = q;
    attention.q_stride.token = q_stride;
    attention.k_pages = k_pages;
    attention.v_pages = v_pages;
    attention.sinks = layer.sinks;
    attention.sm_scale = static_cast<float>(layer.sm_scale);
    attention.soft_cap = static_cast<float>(layer.soft_cap);
    attention.window_left = layer.window_left;
    launch(attention, *rows_of<cpu::PlanCounts>(counts), s.num_tokens);
    // The residual stream goes from `in` to b.normed, which nobody reads any more, and from there to b.x.
    run.linear(layer.o_proj, b.mixed, in, b.normed, s.num_tokens);
    run.norm(b.normed, layer.output_norm, b.x, s.num_tokens);
    run.linear(layer.gate_up, b.x, nullptr, b.act, s.num_tokens);
    run.linear(layer.down, b.act, b.normed, b.x, s.num_tokens);
    in = b.x;
  }

  // Head.

  if (num_logits == 0) return {logits, hidden};
  const int64_t row_bytes = s.hidden_size * s.element_size;
  // logit_rows may name a token more than once, so b may have too few rows for all logits.
  Tensor chosen = torch::stable::new_empty(hidden, {num_logits, s.hidden_size});
  for (int64_t i = 0; i < num_logits; ++i) {
    std::memcpy(static_cast<char*>(chosen.mutable_data_ptr()) + i * row_bytes,
                static_cast<const char*>(in) + row[i] * row_bytes, static_cast<size_t>(row_bytes));
  }
  run.norm(chosen.const_data_ptr(), final_norm, hidden.mutable_data_ptr(), num_logits);
  for (int64_t begin = 0; begin < num_logits; begin += s.num_tokens) {
    const int64_t rows = std::min(s.num_tokens, num_logits - begin);
    run.linear(lm_head, static_cast<const char*>(hidden.const_data_ptr()) + begin * row_bytes, nullptr,
               static_cast<char*>(logits.mutable_data_ptr()) + begin * vocab_size * s.element_size, rows);
  }
  return {logits, hidden};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("decoder_forward", TORCH_BOX(&decoder_forward_cpu)); }

}  // namespace treedecode
