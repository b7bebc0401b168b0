import pytest
import torch

from treedecode import ops


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_rotary_embed(compare, dtype, num_tokens):
    q, k = torch.randn(num_tokens, 9, 64).to(dtype), torch.randn(num_tokens, 3, 64).to(dtype)
    angles = torch.randn(num_tokens, 64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def elementary():
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * c + rotate_half(q) * s, k * c + rotate_half(k) * s

    compare(
        lambda: ops.rotary_embed(q, k, cos, sin),
        {"elementary ops": elementary},
        num_bytes=2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes,
        dtype=dtype,
    )
