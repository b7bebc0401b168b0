// Every op's schema, in one place. Kernels are registered per backend in api/<op>.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(treedecode, m) {
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
  m.def("_cpu_isa(int isa) -> (int, int)");
}
