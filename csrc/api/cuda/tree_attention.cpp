#include "../../cuda/attention/tree_attention.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "../kernel_dtype.h"
#include "../tree_attention_args.h"
#include "device.h"

namespace treedecode {
namespace {

// Kernels check what they use of the plan, in every call.
void tree_attention_cuda(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor q_indptr,
                         Tensor part_indptr, Tensor chunks, Tensor counts, Tensor order, Tensor row_indptr, Tensor out,
                         std::optional<Tensor> lse, double sm_scale, int64_t window_left, double logits_soft_cap,
                         std::optional<Tensor> sinks, bool /* checks_plan */) {
  check_tree_attention(q, k_pages, v_pages, page_table, seq_lens, q_indptr, part_indptr, chunks, counts, order,
                       row_indptr, out, lse, sm_scale, window_left, logits_soft_cap, sinks);
  const int64_t num_q = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2), num_kv_heads = k_pages.size(2);
  const int64_t num_rows = page_table.size(0), group_size = num_qo_heads / num_kv_heads;
  check_value(num_q * num_qo_heads <= std::numeric_limits<int32_t>::max(), "q",
              "query tokens times heads in the range of int32", static_cast<double>(num_q * num_qo_heads));
  check_device({{&q, "q"},
                {&k_pages, "k_pages"},
                {&v_pages, "v_pages"},
                {&page_table, "page_table"},
                {&seq_lens, "seq_lens"},
                {&q_indptr, "plan.q_indptr"},
                {&part_indptr, "plan.part_indptr"},
                {&chunks, "plan.chunks"},
                {&counts, "plan.counts"},
                {&order, "plan.order"},
                {&row_indptr, "plan.row_indptr"},
                {&out, "out"},
                {lse ? &*lse : nullptr, "lse"},
                {sinks ? &*sinks : nullptr, "sinks"}});

  const int64_t num_cuts = std::max<int64_t>(0, chunks.size(0) - std::max<int64_t>(0, 2 * num_rows - 1));
  const int64_t max_parts = cuda::max_parts(num_q, num_cuts, group_size);
  const DeviceGuard guard(q.get_device_index());
  Tensor part_out = torch::stable::new_empty(q, {max_parts, num_qo_heads, head_dim}, ScalarType::Float);
  Tensor part_lse = torch::stable::new_empty(q, {max_parts, num_qo_heads}, ScalarType::Float);
  constexpr double kLog2e = 1.4426950408889634;
  const cuda::TreeAttentionParams p{
      .q = q.const_data_ptr(),
      .k_pages = k_pages.const_data_ptr(),
      .v_pages = v_pages.const_data_ptr(),
      .page_table = page_table.const_data_ptr<int32_t>(),
      .seq_lens = seq_lens.const_data_ptr<int32_t>(),
      .q_indptr = q_indptr.const_data_ptr<int32_t>(),
      .part_indptr = part_indptr.const_data_ptr<int32_t>(),
      .order = order.const_data_ptr<int32_t>(),
      .row_indptr = row_indptr.const_data_ptr<int32_t>(),
      .chunks = rows_of<cpu::FlatChunk>(chunks),
      .counts = rows_of<cpu::PlanCounts>(counts),
      .sinks = sinks ? sinks->const_data_ptr<float>() : nullptr,
      .out = out.mutable_data_ptr(),
      .lse = lse ? lse->mutable_data_ptr<float>() : nullptr,
      .part_out = part_out.mutable_data_ptr<float>(),
      .part_lse = part_lse.mutable_data_ptr<float>(),
      .num_q = num_q,
      .num_rows = num_rows,
      .num_qo_heads = num_qo_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .num_pages = k_pages.size(0),
      .page_size = k_pages.size(1),
      .max_pages = page_table.size(1),
      .max_chunks = chunks.size(0),
      .max_parts = max_parts,
      .page_table_stride = page_table.stride(0),
      .q_stride = {q.stride(0), q.stride(1)},
      .k_stride = {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)},
      .v_stride = {v_pages.stride(0), v_pages.stride(1), v_pages.stride(2)},
      .window_left = window_left,
      .group_size = static_cast<int32_t>(group_size),
      .soft_cap = static_cast<float>(logits_soft_cap),
      .scale = static_cast<float>(logits_soft_cap > 0 ? kLog2e : sm_scale * kLog2e),
      .cap_scale = static_cast<float>(logits_soft_cap > 0 ? sm_scale / logits_soft_cap : 0),
      .dtype = kernel_dtype(q),
  };
  check_launch(cuda::tree_attention(p, current_stream(q)), "tree_attention");
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("tree_attention", TORCH_BOX(&tree_attention_cuda)); }

}  // namespace treedecode
