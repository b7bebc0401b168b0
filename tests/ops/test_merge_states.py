import pytest
import torch
from support.merge_states_cases import assert_within_budget, random_parts

from treedecode import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("num_heads", "head_dim"), [(9, 64), (1, 16), (16, 72), (33, 8), (3, 257), (2, 600)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(isa, dtype, num_heads, head_dim):
    torch.manual_seed(0)
    parts = random_parts([3, 1, 0, 17, 2, 0, 5, 1], num_heads, head_dim, dtype)
    assert_within_budget(ops.merge_states(*parts), *parts)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_any_range_of_lse(isa, offset):
    torch.manual_seed(1)
    part_out, part_lse, merge_indptr = random_parts([4] * 6, 5, 24, torch.float32)
    part_lse[:12] *= 20
    part_lse += offset
    assert_within_budget(ops.merge_states(part_out, part_lse, merge_indptr), part_out, part_lse, merge_indptr)


def test_states_without_keys(isa):
    part_out = torch.full((3, 2, 16), torch.nan)
    part_lse = torch.full((3, 2), -torch.inf)
    out, lse = ops.merge_states(part_out, part_lse, torch.tensor([0, 0, 1, 3], dtype=torch.int32))
    assert torch.equal(out, torch.zeros(3, 2, 16))
    assert lse.isneginf().all()


def test_one_part_is_unchanged(isa):
    torch.manual_seed(2)
    part_out, part_lse, merge_indptr = random_parts([1] * 5, 3, 40, torch.bfloat16, empty=0.0)
    out, lse = ops.merge_states(part_out, part_lse, merge_indptr)
    assert torch.equal(out, part_out)
    assert torch.equal(lse, part_lse)


def test_nan_is_not_hidden(isa):
    torch.manual_seed(3)
    part_out, part_lse, merge_indptr = random_parts([3, 3], 2, 16, torch.float32, empty=0.0)
    part_lse[0, 0] = torch.nan
    part_out[4, 1, 3] = torch.nan
    part_lse[4, 1] = part_lse[:, 1].max()
    out, lse = ops.merge_states(part_out, part_lse, merge_indptr)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert out.isnan().sum() == 16 + 1


def test_strided_parts(isa):
    torch.manual_seed(4)
    part_out, part_lse, merge_indptr = random_parts([2, 3, 1], 4, 24, torch.float32)
    want = ops.merge_states(part_out, part_lse, merge_indptr)
    strided = part_out.transpose(0, 1).contiguous().transpose(0, 1)
    got = ops.merge_states(strided, part_lse, merge_indptr)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_does_not_depend_on_the_number_of_threads(isa):
    torch.manual_seed(5)
    parts = random_parts([5, 0, 1, 8] * 64, 8, 128, torch.float32)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        results.append(ops.merge_states(*parts))
    torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.treedecode.merge_states, random_parts([2, 3], 2, 16, dtype, empty=0.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"part_out": torch.zeros(5, 2)}, ValueError, r"part_out: expected shape \[num_parts, num_heads, head_dim\]"),
        (
            {"part_out": torch.zeros(5, 2, 8).double()},
            TypeError,
            "part_out: expected dtype float32, bfloat16 or float16",
        ),
        ({"part_out": torch.zeros(5, 8, 2).mT}, ValueError, "part_out: expected unit stride in the last dimension"),
        ({"part_lse": torch.zeros(5, 3)}, ValueError, r"part_lse: expected shape .* = \[5, 2\], got \[5, 3\]"),
        ({"part_lse": torch.zeros(5, 2).half()}, TypeError, "part_lse: expected dtype float32, got float16"),
        ({"merge_indptr": torch.tensor([0, 5])}, TypeError, "merge_indptr: expected dtype int32, got int64"),
        ({"merge_indptr": torch.tensor([0, 6]).int()}, ValueError, "merge_indptr: .* num_parts = 5, got 6 at index 1"),
        ({"merge_indptr": torch.tensor([0, 3, 2]).int()}, ValueError, "merge_indptr: .* got 2 at index 2"),
        ({"merge_indptr": torch.tensor([-1, 3]).int()}, ValueError, "merge_indptr: .* got -1 at index 0"),
        ({"merge_indptr": torch.tensor([]).int()}, ValueError, "merge_indptr: expected at least one offset, got 0"),
    ],
)
def test_bad_arguments(change, error, message):
    args = {
        "part_out": torch.zeros(5, 2, 8),
        "part_lse": torch.zeros(5, 2),
        "merge_indptr": torch.tensor([0, 2, 5]).int(),
    } | change
    with pytest.raises(error, match=message):
        ops.merge_states(**args)
