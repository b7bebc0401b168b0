#include "../../cuda/logits/sample.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "../sample_args.h"
#include "device.h"
#include "logits_params.h"

namespace treedecode {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample_cuda(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
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
  check_device({{&logits, "logits"},
                {&temperature, "temperature"},
                {&top_k, "top_k"},
                {&top_p, "top_p"},
                {&min_p, "min_p"},
                {&seed, "seed"},
                {&position, "position"},
                {token_mask ? &*token_mask : nullptr, "token_mask"}});

  const DeviceGuard guard(logits.get_device_index());
  Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Int);
  Tensor logprob = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  cuda::SampleParams p{};
  p.logits = logits_params(logits, token_mask);
  p.temperature = temperatures.data;
  p.top_k = top_ks.data;
  p.top_p = top_ps.data;
  p.min_p = min_ps.data;
  p.seeds = seeds.data;
  p.positions = positions.data;
  p.token = token.mutable_data_ptr<int32_t>();
  p.logprob = logprob.mutable_data_ptr<float>();
  p.entropy = entropy.mutable_data_ptr<float>();
  p.strides = {.temperature = temperatures.stride,
               .top_k = top_ks.stride,
               .top_p = top_ps.stride,
               .min_p = min_ps.stride,
               .seed = seeds.stride,
               .position = positions.stride};
  const int64_t chunks = rows * p.logits.num_chunks;
  Scratch scratch;
  scratch.add(&p.chunk_sums, chunks);
  scratch.add(&p.chunk_min_key, chunks);
  scratch.add(&p.chunk_keys, chunks * cuda::kSampleSlot);
  const Tensor memory = scratch.allocate(logits);
  check_launch(cuda::sample(p, current_stream(logits)), "sample");
  return {token, logprob, entropy};
}

}  // namespace

TD_CUDA_OPS(m) { m.impl("sample", TORCH_BOX(&sample_cuda)); }

}  // namespace treedecode
