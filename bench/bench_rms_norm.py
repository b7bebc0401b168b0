import pytest
import torch

from treedecode import ops


@pytest.mark.parametrize("rows", [1, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_rms_norm(compare, dtype, rows):
    x, weight = torch.randn(rows, 576).to(dtype), torch.randn(576).to(dtype)

    def elementary():
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * h.to(dtype)

    compare(
        lambda: ops.rms_norm(x, weight, 1e-5),
        {"elementary ops": elementary, "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (576,), weight, 1e-5)},
        num_bytes=2 * x.nbytes + weight.nbytes,
        dtype=dtype,
    )
