#include "sample.cuh"

#include "../common/launch.cuh"

namespace treedecode::cuda {
namespace {

template <typename T>
cudaError_t sample_rows(const SampleParams& p, cudaStream_t stream) {
  const auto rows = static_cast<uint32_t>(p.logits.rows);
  const cudaError_t error = launch(&_sample_scan_kernel<T>, {rows * p.logits.num_chunks}, kLogitsThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch_dependent(&_sample_draw_kernel<T>, {rows}, kLogitsThreads, 0, stream, p);
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (p.logits.rows == 0) return cudaSuccess;
  switch (p.logits.dtype) {
    case DType::F32: return sample_rows<float>(p, stream);
    case DType::BF16: return sample_rows<bf16>(p, stream);
    case DType::F16: return sample_rows<fp16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace treedecode::cuda
