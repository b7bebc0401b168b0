import itertools

import pytest
import torch

from treedecode import ops

# The linear layers of SmolLM2-135M: (in_features, out_features, gate).
SHAPES = {
    "qkv": (576, 960, ""),
    "o_proj": (576, 576, ""),
    "gate_up": (576, 1536, "silu"),
    "down": (1536, 576, ""),
    "lm_head": (576, 49152, ""),
}


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_packed_linear(compare, dtype, shape, rows):
    in_features, out_features, gate = SHAPES[shape]
    count = 2 if gate else 1
    weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(count)]
    # more than the caches hold, because a step reads each layer once
    copies = max(1, 100_000_000 // (count * weights[0].nbytes))
    ours = itertools.cycle([ops.pack_weight(*weights) for _ in range(copies)])
    plain = itertools.cycle([torch.cat(weights) for _ in range(copies)])
    onednn = itertools.cycle([torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), rows) for _ in range(copies)])
    x = torch.randn(rows, in_features).to(dtype)

    def gated(y):
        return torch.nn.functional.silu(y[:, :out_features]) * y[:, out_features:] if gate else y

    compare(
        lambda: ops.packed_linear(x, next(ours), out_features, gate=gate),
        {
            "F.linear": lambda: gated(torch.nn.functional.linear(x, next(plain))),
            "oneDNN prepacked": lambda: gated(
                torch.ops.mkldnn._linear_pointwise(x, next(onednn), None, "none", [], "")
            ),
        },
        num_bytes=count * weights[0].nbytes + x.nbytes + rows * out_features * x.element_size(),
        num_flops=2 * rows * in_features * out_features * count,
        dtype=dtype,
    )
