"""Triton kernel of merge_states.

Per state and head: m_i is the maximum of the parts' lse, weight = exp(lse - m_i), l_i the sum of weights, and acc that
of weight * part_out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from treedecode.triton_kernels import check


@triton.jit
def _merge_states_kernel(
    out_ptr, lse_ptr,  # [num_states, H, D], [num_states, H]
    part_out_ptr, part_lse_ptr,  # [num_parts, H, D] with strides (part, head), [num_parts, H]
    indptr_ptr,  # [num_states + 1] int32
    part_stride_p, part_stride_h, H, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    state, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(indptr_ptr + state), tl.load(indptr_ptr + state + 1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    part_lse_ptr += begin.to(tl.int64) * H + head
    part_out_ptr += begin.to(tl.int64) * part_stride_p + head * part_stride_h
    m_i = -float("inf")
    lse_ptrs = part_lse_ptr
    for _ in range(begin, end):
        lse = tl.load(lse_ptrs)
        lse_ptrs += H
        m_i = tl.where(lse > m_i, lse, m_i)  # leaves NaN out, which the sums below have again
    base = tl.where(m_i == -float("inf"), 0.0, m_i)  # (-inf) - (-inf) would be NaN
    l_i = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for _ in range(begin, end):
        lse = tl.load(part_lse_ptr)
        weight = tl.exp(lse - base)
        # a part without keys has weight 0, and its out may hold anything
        mask = d < tl.where(lse == -float("inf"), 0, D)
        x = tl.load(part_out_ptr + d, mask=mask, other=0.0).to(tl.float32)
        part_lse_ptr += H
        part_out_ptr += part_stride_p
        l_i += weight
        acc += weight * x
    empty = l_i == 0.0
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, l_i))
    row = state * H + head
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + row, tl.where(empty, -float("inf"), base + tl.log(l_i)))


def merge_states(part_out: Tensor, part_lse: Tensor, merge_indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Launches `treedecode.ops.merge_states`. Offsets are not checked."""
    check.tensor(part_out, "part_out", "[num_parts, num_heads, head_dim]", (-1, -1, -1), *check.FLOATS)
    num_parts, num_heads, head_dim = part_out.shape
    check.tensor(part_lse, "part_lse", "[num_parts, num_heads]", (num_parts, num_heads), torch.float32, contiguous=True)
    check.tensor(merge_indptr, "merge_indptr", "[num_states + 1]", (-1,), torch.int32, contiguous=True)
    check.value(merge_indptr.shape[0] > 0, "merge_indptr", "at least one offset", merge_indptr.shape[0])
    num_states = merge_indptr.shape[0] - 1
    out = part_out.new_empty(num_states, num_heads, head_dim)
    lse = part_lse.new_empty(num_states, num_heads)
    if out.numel():
        block = min(256, triton.next_power_of_2(head_dim))
        _merge_states_kernel[(num_states, num_heads, triton.cdiv(head_dim, block))](
            out, lse, part_out, part_lse, merge_indptr, *part_out.stride()[:2], num_heads, head_dim, BLOCK_D=block,
            num_warps=1,
        )  # fmt: skip
    return out, lse
