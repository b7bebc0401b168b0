import pytest
import torch

from treedecode import ops


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_merge_states(compare, dtype, parts):
    num_states, num_heads, head_dim = 256, 32, 128
    part_out = torch.randn(num_states * parts, num_heads, head_dim).to(dtype)
    part_lse = torch.randn(num_states * parts, num_heads)
    merge_indptr = torch.arange(0, num_states * parts + 1, parts, dtype=torch.int32)

    def torch_merge():  # only for equal numbers of parts
        lse = part_lse.unflatten(0, (num_states, parts))
        total = lse.logsumexp(1)
        weight = (lse - total[:, None]).exp()[..., None]
        return (weight * part_out.unflatten(0, (num_states, parts))).sum(1).to(dtype), total

    out, lse = ops.merge_states(part_out, part_lse, merge_indptr)
    for a, b in zip((out, lse), torch_merge(), strict=True):
        torch.testing.assert_close(a, b)
    compare(
        lambda: ops.merge_states(part_out, part_lse, merge_indptr),
        {"torch": torch_merge},
        num_bytes=part_out.nbytes + part_lse.nbytes + out.nbytes + lse.nbytes,
        num_flops=2 * part_out.numel(),
        dtype=dtype,
    )
