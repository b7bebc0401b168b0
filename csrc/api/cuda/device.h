// What every CUDA op needs of torch: devices, the current stream, registration.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../../check.h"

// A torch without CUDA lacks it. Weak, the library loads there all the same, and its checks can be tested.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace treedecode {

using torch::stable::accelerator::DeviceGuard;

inline std::string device_of(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device";
}

// The first tensor lies on a CUDA device, and all others on the same one.
inline void check_device(std::initializer_list<std::pair<const Tensor*, const char*>> tensors) {
  const Tensor& first = *tensors.begin()->first;
  STD_TORCH_CHECK(first.is_cuda() && aoti_torch_get_current_cuda_stream, "[ValueError] ", tensors.begin()->second,
                  ": expected a CUDA tensor, got ", device_of(first));
  for (const auto& [tensor, name] : tensors) {
    if (tensor == nullptr) continue;
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == first.get_device_index(), "[ValueError] ", name,
                    ": expected a tensor on ", device_of(first), ", got ", device_of(*tensor));
  }
}

// Of the device that `t` lies on, as check_device has made sure.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace treedecode

// Registers ops for CUDA tensors, and in the namespace treedecode_cuda for tensors of any device: there a test without
// a GPU reaches their argument checks, the last of which refuses the device.
#define TD_CUDA_OPS(m)                                                                                              \
  static void td_register_cuda_ops(torch::stable::detail::StableLibrary& m);                                        \
  STABLE_TORCH_LIBRARY_IMPL(treedecode, CUDA, library) { td_register_cuda_ops(library); }                           \
  STABLE_TORCH_LIBRARY_IMPL(treedecode_cuda, CompositeExplicitAutograd, library) { td_register_cuda_ops(library); } \
  static void td_register_cuda_ops(torch::stable::detail::StableLibrary& m)
