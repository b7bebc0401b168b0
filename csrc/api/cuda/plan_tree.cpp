#include "../../cuda/plan/plan_tree.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "../plan_tree_args.h"
#include "device.h"

namespace treedecode {
namespace {

PlanTensors plan_tree_cuda(Tensor page_table, Tensor seq_lens, std::optional<Tensor> q_lens, int64_t page_size,
                           int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_workers) {
  check_plan_tree(page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, head_dim, num_workers);
  check_value(num_workers > 0, "num_workers", "1 or more on a GPU (0 makes a chained plan, for the CPU)", num_workers);
  check_device({{&page_table, "page_table"}, {&seq_lens, "seq_lens"}, {q_lens ? &*q_lens : nullptr, "q_lens"}});

  const int64_t num_rows = page_table.size(0), max_pages = page_table.size(1);
  const int64_t workers = std::max<int64_t>(1, num_workers / num_kv_heads);
  const DeviceGuard guard(page_table.get_device_index());
  Tensor q_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor part_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor order = torch::stable::new_empty(seq_lens, {num_rows});
  Tensor row_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor chunks = torch::stable::new_empty(
      seq_lens, {cpu::max_chunks(num_rows, max_pages, page_size, workers), cpu::kChunkColumns});
  Tensor counts = torch::stable::new_empty(seq_lens, {cpu::kNumCounts});
  Tensor scratch = torch::stable::new_empty(seq_lens, {cuda::plan_scratch(num_rows, max_pages)});
  Tensor hashes = torch::stable::new_empty(seq_lens, {num_rows, cuda::num_hash_segments(max_pages)}, ScalarType::Long);
  const cuda::PlanTreeParams p{
      page_table.const_data_ptr<int32_t>(),
      seq_lens.const_data_ptr<int32_t>(),
      q_lens ? q_lens->const_data_ptr<int32_t>() : nullptr,
      q_indptr.mutable_data_ptr<int32_t>(),
      part_indptr.mutable_data_ptr<int32_t>(),
      order.mutable_data_ptr<int32_t>(),
      row_indptr.mutable_data_ptr<int32_t>(),
      reinterpret_cast<cpu::FlatChunk*>(chunks.mutable_data_ptr<int32_t>()),
      reinterpret_cast<cpu::PlanCounts*>(counts.mutable_data_ptr<int32_t>()),
      scratch.mutable_data_ptr<int32_t>(),
      reinterpret_cast<uint64_t*>(hashes.mutable_data_ptr<int64_t>()),
      num_rows,
      max_pages,
      page_table.stride(0),
      page_size,
      num_qo_heads / num_kv_heads,
      workers,
      ~uint64_t{0},
  };
  check_launch(cuda::plan_tree(p, current_stream(page_table)), "plan_tree");
  return {q_indptr, part_indptr, chunks, counts, order, row_indptr};
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("plan_tree", TORCH_BOX(&plan_tree_cuda)); }

}  // namespace treedecode
