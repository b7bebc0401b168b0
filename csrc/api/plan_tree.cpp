#include "../cpu/plan_tree.h"

#include <limits>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../cpu/row_order.h"
#include "parallel.h"
#include "plan_tree_args.h"

namespace treedecode {
namespace {

PlanTensors plan_tree_cpu(Tensor page_table, Tensor seq_lens, std::optional<Tensor> q_lens, int64_t page_size,
                          int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim, int64_t num_workers) {
  check_plan_tree(page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, head_dim, num_workers);
  const int64_t num_rows = page_table.size(0);
  const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* queries = q_lens ? q_lens->const_data_ptr<int32_t>() : nullptr;
  const int64_t workers = num_workers ? std::max<int64_t>(1, num_workers / num_kv_heads) : 0;
  const int64_t capacity = page_table.size(1) * page_size;
  for (int64_t row = 0; row < num_rows; ++row) {
    STD_TORCH_CHECK(lens[row] >= 0 && lens[row] <= capacity,
                    "[ValueError] seq_lens: expected values from 0 to max_pages * page_size = ", capacity, ", got ",
                    lens[row], " at index ", row);
    if (!queries) continue;
    STD_TORCH_CHECK(queries[row] >= 0 && (queries[row] <= lens[row] || lens[row] == 0),
                    "[ValueError] q_lens: expected values from 0 to the branch's seq_len ", lens[row], ", got ",
                    queries[row], " at index ", row);
  }

  Tensor q_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor part_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor order = torch::stable::new_empty(seq_lens, {num_rows});
  Tensor row_indptr = torch::stable::new_empty(seq_lens, {num_rows + 1});
  Tensor chunks = torch::stable::new_empty(
      seq_lens, {cpu::max_chunks(num_rows, page_table.size(1), page_size, workers), cpu::kChunkColumns});
  Tensor counts = torch::stable::new_empty(seq_lens, {cpu::kNumCounts});
  const cpu::PlanTreeParams p{
      page_table.const_data_ptr<int32_t>(),
      lens,
      queries,
      q_indptr.mutable_data_ptr<int32_t>(),
      part_indptr.mutable_data_ptr<int32_t>(),
      order.mutable_data_ptr<int32_t>(),
      row_indptr.mutable_data_ptr<int32_t>(),
      chunks.mutable_data_ptr<int32_t>(),
      reinterpret_cast<cpu::PlanCounts*>(counts.mutable_data_ptr<int32_t>()),
      num_rows,
      page_table.size(1),
      page_table.stride(0),
      page_size,
      num_qo_heads / num_kv_heads,
      workers,
  };
  std::vector<int32_t> shared(static_cast<size_t>(num_rows));
  // A thread is worth waking for about a million page ids, which take some 300 us: beside a busy process, waiting for a
  // second thread takes milliseconds.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, p.max_pages));
  const auto compare_neighbours = [&] {
    parallel_for(0, num_rows, grain,
                 [&](int64_t begin, int64_t end) { cpu::common_pages(p, shared.data(), begin, end); });
  };
  std::iota(p.order, p.order + num_rows, 0);
  if (workers) cpu::sort_rows(p);  // results of a flat plan depend on the order, in the last bits
  compare_neighbours();
  if (!workers && !cpu::is_depth_first(p, shared.data())) {
    cpu::sort_rows(p);
    compare_neighbours();
  }
  STD_TORCH_CHECK(cpu::plan_tree(p, shared.data()),
                  "[ValueError] seq_lens: the branches' tokens, queries or partial results add up to more than ",
                  std::numeric_limits<int32_t>::max());
  return {q_indptr, part_indptr, chunks, counts, order, row_indptr};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("plan_tree", TORCH_BOX(&plan_tree_cpu)); }

}  // namespace treedecode
