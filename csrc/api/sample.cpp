#include "../cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "parallel.h"
#include "sample_args.h"

namespace treedecode {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample_cpu(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
                                              Tensor min_p, Tensor seed, Tensor position,
                                              std::optional<Tensor> token_mask) {
  check_logits(logits);
  const int64_t rows = logits.size(0);
  const auto temperatures = per_row<float>(temperature, "temperature", ScalarType::Float, rows);
  const auto top_ks = per_row<int32_t>(top_k, "top_k", ScalarType::Int, rows);
  const auto top_ps = per_row<float>(top_p, "top_p", ScalarType::Float, rows);
  const auto min_ps = per_row<float>(min_p, "min_p", ScalarType::Float, rows);
  const auto seeds = per_row<int64_t>(seed, "seed", ScalarType::Long, rows);
  const auto positions = per_row<int64_t>(position, "position", ScalarType::Long, rows);
  if (token_mask) check_token_mask(*token_mask, logits);

  std::vector<cpu::SampleSettings> settings(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    check_value(temperatures[r] >= 0 && temperatures[r] < INFINITY, "temperature", "0 or a positive finite number",
                temperatures[r]);
    check_value(top_ks[r] >= 0, "top_k", "0 (off) or more", top_ks[r]);
    check_value(top_ps[r] >= 0 && top_ps[r] <= 1, "top_p", "a number in [0, 1]", top_ps[r]);
    check_value(min_ps[r] >= 0 && min_ps[r] <= 1, "min_p", "a number in [0, 1]", min_ps[r]);
    settings[static_cast<size_t>(r)] = {temperatures[r],
                                        top_ps[r],
                                        min_ps[r],
                                        top_ks[r],
                                        static_cast<uint64_t>(seeds[r]),
                                        static_cast<uint64_t>(positions[r])};
  }

  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Int);
  Tensor logprob = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  std::vector<int32_t> status(static_cast<size_t>(rows));
  const cpu::SampleParams p{
      logits.const_data_ptr(),
      token_mask ? token_mask->const_data_ptr<int32_t>() : nullptr,
      settings.data(),
      token.mutable_data_ptr<int32_t>(),
      logprob.mutable_data_ptr<float>(),
      entropy.mutable_data_ptr<float>(),
      status.data(),
      rows,
      logits.size(1),
      logits.stride(0),
      token_mask ? token_mask->stride(0) : 0,
      kernel_dtype(logits),
  };
  const auto kernel = TD_DISPATCH(sample);
  // Below 16384 logits a second thread costs more to wake than it saves.
  parallel_for(0, rows, std::max<int64_t>(1, 16384 / p.vocab), [&](int64_t begin, int64_t end) {
    const int64_t num_blocks = (p.vocab + cpu::SampleScratch::kBlock - 1) / cpu::SampleScratch::kBlock;
    const auto band = scratch<float>(p.vocab + 64), work = scratch<float>(p.vocab + 64);
    const auto masses = scratch<double>(num_blocks),
               above = scratch<double>(num_blocks * cpu::SampleScratch::kThresholds);
    const auto ends = scratch<int64_t>(num_blocks), ties = scratch<int64_t>(num_blocks);
    const auto keys = scratch<uint64_t>(cpu::SampleScratch::kKeys),
               seeds = scratch<uint64_t>(cpu::SampleScratch::kSeeds);
    kernel(p, begin, end,
           {band.get(), work.get(), masses.get(), above.get(), ends.get(), ties.get(), keys.get(), seeds.get()});
  });
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(status[static_cast<size_t>(r)] != cpu::kNotFinite,
                    "[ValueError] logits: expected numbers below +inf, got NaN or +inf in row ", r);
    STD_TORCH_CHECK(
        status[static_cast<size_t>(r)] != cpu::kNoToken,
        "[ValueError] logits: expected at least one token above -inf that token_mask allows, got none in row ", r);
  }
  return {token, logprob, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("sample", TORCH_BOX(&sample_cpu)); }

}  // namespace treedecode
