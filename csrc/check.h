// Argument checks of the op boundary. A failed check names the argument, the expected value and the one it got. The
// leading "[ValueError]" or "[TypeError]" tells the Python wrapper which exception to raise.
#pragma once

#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace treedecode {

using Tensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    default: return "an unsupported dtype";
  }
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

// "-1" in `expected` matches any size; `text` is how the shape reads to the user, e.g. "[num_q, num_qo_heads,
// head_dim]".
inline void check_shape(const Tensor& t, const char* name, const char* text, std::initializer_list<int64_t> expected) {
  bool ok = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t e : expected) {
    if (!ok) break;
    ok = e < 0 || t.size(i) == e;
    ++i;
  }
  if (ok) return;
  std::ostringstream want;
  want << '[';
  i = 0;
  for (int64_t e : expected) {
    want << (i++ ? ", " : "");
    if (e < 0) want << '*';
    else want << e;
  }
  want << ']';
  STD_TORCH_CHECK(false, "[ValueError] ", name, ": expected shape ", text, " = ", want.str(), ", got ", shape_of(t));
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, "[TypeError] ", name, ": expected dtype ", dtype_name(expected),
                  ", got ", dtype_name(t.scalar_type()));
}

inline void check_float_dtype(const Tensor& t, const char* name) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half, "[TypeError] ", name,
                  ": expected dtype float32, bfloat16 or float16, got ", dtype_name(s));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), "[ValueError] ", name, ": expected a contiguous tensor");
}

inline void check_unit_stride(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, "[ValueError] ", name,
                  ": expected unit stride in the last dimension, got ", t.stride(t.dim() - 1));
}

inline void check_value(bool ok, const char* name, const std::string& expected, double got) {
  STD_TORCH_CHECK(ok, "[ValueError] ", name, ": expected ", expected, ", got ", got);
}

}  // namespace treedecode
