#include "../cpu/beam_prune.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "beam_prune_args.h"
#include "parallel.h"

namespace treedecode {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> beam_prune_cpu(Tensor logits, Tensor cum_logprobs, Tensor group_indptr,
                                                          int64_t num_candidates, std::optional<Tensor> token_mask,
                                                          bool is_logprobs) {
  check_beam_prune(logits, cum_logprobs, group_indptr, num_candidates, token_mask);
  const int64_t rows = logits.size(0), vocab = logits.size(1), k = num_candidates;
  const int64_t row_k = std::min(k, vocab);
  for (int64_t r = 0; r < rows; ++r) {
    const float cum = cum_logprobs.const_data_ptr<float>()[r];
    STD_TORCH_CHECK(cum < INFINITY, "[ValueError] cum_logprobs: expected numbers below +inf, got ", cum, " in row ", r);
  }
  const int64_t num_groups = group_indptr.size(0) - 1;
  const int32_t* indptr = group_indptr.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(indptr[0] == 0 && indptr[num_groups] == rows,
                  "[ValueError] group_indptr: expected offsets from 0 to rows = ", rows);
  int64_t largest_group = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    STD_TORCH_CHECK(indptr[g] <= indptr[g + 1],
                    "[ValueError] group_indptr: expected offsets that do not decrease, got ", indptr[g + 1], " after ",
                    indptr[g], " at index ", g + 1);
    largest_group = std::max<int64_t>(largest_group, indptr[g + 1] - indptr[g]);
  }
  STD_TORCH_CHECK(largest_group * row_k <= INT32_MAX,
                  "[ValueError] num_candidates: expected rows of a group * min(num_candidates, vocab) below 2^31, got ",
                  largest_group * row_k);

  Tensor scores = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Float);
  Tensor parent = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Int);
  Tensor token = torch::stable::new_empty(logits, {num_groups, k}, ScalarType::Int);
  Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  // Two chunks from 32768 tokens on, so that one row can occupy two threads; longer ones cost fewer false candidates.
  const int64_t num_chunks = std::max<int64_t>((vocab + 65535) / 65536, vocab >= 32768 ? 2 : 1);
  const int64_t chunk_len = ((vocab + num_chunks - 1) / num_chunks + 63) / 64 * 64;
  const auto chunk_keys = scratch<uint64_t>(rows * num_chunks * row_k);
  const auto chunk_counts = scratch<int64_t>(rows * num_chunks);
  const auto chunk_refs = scratch<float>(rows * num_chunks);
  const auto chunk_sums = scratch<double>(rows * num_chunks);
  const auto row_keys = scratch<uint64_t>(rows * row_k);
  const auto row_tokens = scratch<int32_t>(rows * row_k);
  const auto row_counts = scratch<int64_t>(rows);
  const cpu::BeamPruneParams p{
      logits.const_data_ptr(),
      token_mask ? token_mask->const_data_ptr<int32_t>() : nullptr,
      cum_logprobs.const_data_ptr<float>(),
      indptr,
      scores.mutable_data_ptr<float>(),
      parent.mutable_data_ptr<int32_t>(),
      token.mutable_data_ptr<int32_t>(),
      lse.mutable_data_ptr<float>(),
      chunk_keys.get(),
      chunk_counts.get(),
      chunk_refs.get(),
      chunk_sums.get(),
      row_keys.get(),
      row_tokens.get(),
      row_counts.get(),
      rows,
      vocab,
      num_groups,
      k,
      row_k,
      num_chunks,
      chunk_len,
      logits.stride(0),
      token_mask ? token_mask->stride(0) : 0,
      kernel_dtype(logits),
      is_logprobs,
  };
  const auto scan = TD_DISPATCH(beam_prune_scan);
  // Below 16384 logits a second thread costs more to wake than it saves.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::min(chunk_len, vocab));
  parallel_for(0, rows * num_chunks, grain, [&](int64_t begin, int64_t end) {
    const auto buffer = scratch<uint64_t>(p.buffer_len());
    const auto seeds = scratch<uint64_t>(2048);
    scan(p, begin, end, buffer.get(), seeds.get());
  });
  parallel_for(0, rows, std::max<int64_t>(1, 2048 / row_k),
               [&](int64_t begin, int64_t end) { cpu::beam_prune_rank(p, begin, end); });
  parallel_for(0, num_groups, std::max<int64_t>(1, 4096 / (row_k * std::max<int64_t>(largest_group, 1))),
               [&](int64_t begin, int64_t end) {
                 const auto keys = scratch<uint64_t>(largest_group * row_k);
                 cpu::beam_prune_merge(p, begin, end, keys.get());
               });
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(!std::isnan(p.lse[r]), "[ValueError] logits: expected numbers below +inf, got NaN or +inf in row ",
                    r);
  }
  return {scores, parent, token, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("beam_prune", TORCH_BOX(&beam_prune_cpu)); }

}  // namespace treedecode
