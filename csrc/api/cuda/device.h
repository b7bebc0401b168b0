// Parts of torch that every CUDA op uses: devices, the current stream, registration.
#pragma once

#include <dlfcn.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../../check.h"

namespace treedecode {

using torch::stable::accelerator::DeviceGuard;

inline std::string device_of(const Tensor& t) {
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return t.is_cpu() ? "cpu" : "another device";
}

// Checks that the first tensor is on a CUDA device, and all others on the same one.
inline void check_device(std::initializer_list<std::pair<const Tensor*, const char*>> tensors) {
  const Tensor& first = *tensors.begin()->first;
  STD_TORCH_CHECK(first.is_cuda(), "[ValueError] ", tensors.begin()->second, ": expected a CUDA tensor, got ",
                  device_of(first));
  for (const auto& [tensor, name] : tensors) {
    if (tensor == nullptr) continue;
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == first.get_device_index(), "[ValueError] ", name,
                    ": expected a tensor on ", device_of(first), ", got ", device_of(*tensor));
  }
}

// Returns the current stream of the device of `t`, which check_device has accepted.
inline cudaStream_t current_stream(const Tensor& t) {
  // The function is looked up in the library that torch has loaded. If this library were linked to it, it would not
  // load into a torch without CUDA, where the argument checks are tested. As a weak symbol the loader would not find
  // it, because the symbols of torch's libraries are local.
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get_stream, "treedecode: this torch has CUDA tensors, but no current CUDA stream");
  void* stream = nullptr;
  // STABLE_TORCH_ERROR_CODE_CHECK came with torch 2.13's headers.
  TORCH_ERROR_CODE_CHECK(get_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Device memory of an op while it runs: one allocation for all of its pointers.
class Scratch {
 public:
  // `*pointer` will point to `count` values.
  template <typename T>
  void add(T** pointer, int64_t count) {
    const int64_t begin = num_bytes_;
    parts_.push_back([=](char* base) { *pointer = reinterpret_cast<T*>(base + begin); });
    num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }

  // Allocates the memory on the device of `like`, in the order of the current stream, and sets the pointers.
  Tensor allocate(const Tensor& like) {
    Tensor memory = torch::stable::new_empty(like, {num_bytes_}, ScalarType::Byte);
    for (const auto& part : parts_) part(static_cast<char*>(memory.mutable_data_ptr()));
    return memory;
  }

 private:
  std::vector<std::function<void(char*)>> parts_;
  int64_t num_bytes_ = 0;
};

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace treedecode

// Registers ops for CUDA tensors, and in the namespace treedecode_cuda for tensors of any device: a test without a GPU
// calls the latter for their argument checks, the last of which refuses the device.
#define TD_CUDA_OPS(m)                                                                                              \
  static void td_register_cuda_ops(torch::stable::detail::StableLibrary& m);                                        \
  STABLE_TORCH_LIBRARY_IMPL(treedecode, CUDA, library) { td_register_cuda_ops(library); }                           \
  STABLE_TORCH_LIBRARY_IMPL(treedecode_cuda, CompositeExplicitAutograd, library) { td_register_cuda_ops(library); } \
  static void td_register_cuda_ops(torch::stable::detail::StableLibrary& m)
