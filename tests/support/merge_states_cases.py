"""Partial results for the tests of merge_states, and the error that their merge is allowed."""

import torch

from treedecode import reference


def random_parts(counts, num_heads, head_dim, dtype, empty=0.2):
    """Makes (part_out, part_lse, merge_indptr) with wide-spread lse; parts without keys have NaN as their output."""
    num_parts = sum(counts)
    part_out = torch.randn(num_parts, num_heads, head_dim).to(dtype)
    part_lse = 8 * torch.randn(num_parts, num_heads)
    no_keys = torch.rand(num_parts, num_heads) < empty
    part_lse[no_keys] = -torch.inf
    part_out[no_keys] = torch.nan
    merge_indptr = torch.tensor([0, *counts]).cumsum(0).int()
    return part_out, part_lse, merge_indptr


def assert_within_budget(got, part_out, part_lse, merge_indptr):
    """Allows the error of rounding the exact answer, plus a few ulps of fp32 and one of the output's dtype."""
    dtype = part_out.dtype
    exact, exact_lse = reference.merge_states(part_out, part_lse, merge_indptr)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    budget = (exact.to(dtype).double() - exact).abs() + 2e-6 + torch.finfo(dtype).eps * exact.abs()
    assert ((got[0].double() - exact).abs() <= budget).all()
    empty = exact_lse.isneginf()
    assert torch.equal(got[1].isneginf(), empty)
    error = (got[1].double() - exact_lse).abs()[~empty]
    assert (error <= 2e-6 + torch.finfo(torch.float32).eps * exact_lse[~empty].abs()).all()
