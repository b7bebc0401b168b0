#include "../cpu/rotary_embed.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../check.h"
#include "kernel_dtype.h"
#include "launch.h"
#include "parallel.h"

namespace treedecode {

void launch(const cpu::RotaryEmbedParams& p, int64_t num_tokens) {
  const int64_t grain = 32768 / ((p.num_qo_heads + p.num_kv_heads) * p.head_dim + 1) + 1;
  parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) { TD_DISPATCH(rotary_embed)(p, begin, end); });
}

namespace {

void check_angles(const Tensor& t, const char* name, const Tensor& q) {
  check_shape(t, name, "[num_tokens, head_dim]", {q.size(0), q.size(2)});
  check_dtype(t, name, q.scalar_type());
  check_unit_stride(t, name);
}

void rotary_embed_cpu(Tensor q, Tensor k, Tensor cos, Tensor sin) {
  check_shape(q, "q", "[num_tokens, num_qo_heads, head_dim]", {-1, -1, -1});
  check_float_dtype(q, "q");
  check_unit_stride(q, "q");
  check_value(q.size(2) % 2 == 0, "q", "an even head_dim", static_cast<double>(q.size(2)));
  check_shape(k, "k", "[num_tokens, num_kv_heads, head_dim]", {q.size(0), -1, q.size(2)});
  check_dtype(k, "k", q.scalar_type());
  check_unit_stride(k, "k");
  check_angles(cos, "cos", q);
  check_angles(sin, "sin", q);
  const cpu::RotaryEmbedParams p{
      q.mutable_data_ptr(),
      k.mutable_data_ptr(),
      cos.const_data_ptr(),
      sin.const_data_ptr(),
      q.size(1),
      k.size(1),
      q.size(2),
      {q.stride(0), q.stride(1)},
      {k.stride(0), k.stride(1)},
      cos.stride(0),
      sin.stride(0),
      kernel_dtype(q),
  };
  launch(p, q.size(0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("rotary_embed", TORCH_BOX(&rotary_embed_cpu)); }

}  // namespace treedecode
