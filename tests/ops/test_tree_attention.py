import dataclasses
import itertools
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention_cases import (
    assert_idle_tokens_are_left_out,
    assert_within_budget,
    interleaved_case,
    make_case,
    permuted,
    ragged,
    two_trees_and_loners,
    window_case,
    with_null_pages,
)
from support.forests import as_tables, forests, tree_rows

from treedecode import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # num_qo_heads, num_kv_heads, head_dim, page_size
    (9, 3, 64, 16),
    (14, 2, 64, 8),
    (32, 8, 128, 16),
    (8, 1, 96, 32),
    (4, 4, 16, 1),
    (4, 2, 24, 64),
    (6, 2, 72, 16),
    (3, 1, 80, 8),
    (2, 2, 256, 16),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(isa, dtype, shape):
    num_qo_heads, num_kv_heads, head_dim, page_size = shape
    case = make_case(
        two_trees_and_loners(page_size),
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    assert_within_budget(case, case.run())


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 0},
        {"window_left": 40},
        {"window_left": 100000},
        {"logits_soft_cap": 2.5},
        {"sinks": torch.tensor([0.5, -3.0, 6.0, -torch.inf])},
        {"sm_scale": 0.7, "window_left": 33, "logits_soft_cap": 30.0, "sinks": torch.tensor([1.0, 2.0, 3.0, 4.0])},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(isa, dtype, options):
    forest = two_trees_and_loners(16)
    q_lens = [n if i == 1 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    for lens in (None, q_lens):
        case = make_case(forest, lens, dtype=dtype, **options)
        assert_within_budget(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_beside_decode(isa, dtype):
    long = list(range(22))
    rows = [long, [50, 51, 52], [50, 51, 53, 54], long[:6], [], [70]]
    forest = as_tables(rows, 16, [3, 16, 1, 16, 0, 9])
    for q_lens in ([339, 1, 1, 1, 0, 9], [300, 0, 7, 90, 0, 0], [1, 48, 49, 0, 0, 1]):
        case = make_case(forest, q_lens, num_qo_heads=6, dtype=dtype)
        assert_within_budget(case, case.run())


@pytest.mark.parametrize("head_dims", [range(begin, begin + 64, 8) for begin in (16, 80, 144, 200)], ids=str)
def test_every_head_dim(isa, head_dims):
    forest = ragged(tree_rows([3], [3, 1]), 8)
    for head_dim, dtype in itertools.product(head_dims, DTYPES):
        if head_dim <= 256:
            case = make_case(forest, page_size=8, num_qo_heads=3, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
            assert_within_budget(case, case.run())


@settings(max_examples=100, deadline=None)
@given(forests(max_rows=8, max_tokens=700), st.sampled_from([(3, 3), (9, 3), (7, 1)]), st.sampled_from([-1, 0, 50]))
def test_any_forest(forest, heads, window_left):
    page_table, seq_lens, q_lens, page_size = forest
    if q_lens is not None:
        q_lens = q_lens.clamp(max=20)
    case = make_case(
        (page_table, seq_lens),
        q_lens,
        page_size=page_size,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=16,
        window_left=window_left,
    )
    assert_within_budget(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_branches_on_a_long_prefix(isa, dtype):
    forest = ragged(tree_rows([70], [70, 1]), 16)
    case = make_case(forest, num_qo_heads=8, num_kv_heads=1, head_dim=16, dtype=dtype)
    assert case.plan.num_chunks == 72  # the prefix is cut
    assert_within_budget(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_and_rows_that_end_in_a_shared_page(isa, dtype):
    pages = list(range(20))
    case = make_case(as_tables([pages[:9], pages, pages, pages, pages], 16, [5, 3, 16, 3, 1]), dtype=dtype)
    assert case.plan.unique_tokens == 20 * 16
    assert_within_budget(case, case.run())


@pytest.mark.parametrize("lens", [[1056, 1010, 1056, 1024, 1025], [1009, 1056], [1010, 1056, 1024]])
def test_rows_that_end_in_a_page_that_two_segments_share(isa, lens):
    pages = list(range(22))
    case = make_case(as_tables([pages] * len(lens), 48, [n - 21 * 48 for n in lens]), page_size=48)
    assert_within_budget(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(isa, dtype):
    case = make_case(two_trees_and_loners(16), dtype=dtype, spread=40.0)
    assert_within_budget(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(isa, dtype):
    forest = two_trees_and_loners(16)
    nhd, hnd = (make_case(forest, dtype=dtype, layout=layout) for layout in ("NHD", "HND"))
    assert not hnd.k_pages.is_contiguous()
    for a, b in zip(nhd.run(), hnd.run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable_with_any_number_of_threads(isa, dtype):
    forest = ragged(tree_rows([2, 9], [30, 9, 2]), 16)
    q_lens = [1] * 17 + [200]
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        case = make_case(forest, q_lens, num_qo_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
        results.append(case.run())
    torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_without_keys(isa):
    forest = as_tables([[], [1], []], 16, [0, 3, 0])
    case = make_case(forest, [2, 1, 1])
    out, lse = case.run()
    assert not out[[0, 1, 3]].any()
    assert lse[[0, 1, 3]].isneginf().all()
    assert_within_budget(case, (out, lse))
    case = make_case(forest, [2, 1, 1], sinks=torch.tensor([1.0, -2.0, 0.0, 9.0]))
    out, lse = case.run()
    assert not out[[0, 1, 3]].any()
    assert torch.equal(lse[[0, 1, 3]], case.options["sinks"].expand(3, 4))
    assert_within_budget(case, (out, lse))


@pytest.mark.parametrize("rows", [[], [[], []]])
def test_nothing_to_do(rows):
    case = make_case(as_tables(rows, 16, [0] * len(rows)), [0] * len(rows))
    out, lse = case.run()
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


def test_the_plan_changes_nothing(isa):
    """Any valid plan gives the same bits: here with nodes folded that another plan shares, and without sharing."""
    case = make_case(ragged(tree_rows([2, 2], [70, 1, 5]), 16), dtype=torch.bfloat16)
    heads = {"num_qo_heads": 64, "num_kv_heads": 1}
    plan = ops.plan_tree(case.page_table, case.seq_lens, page_size=16, head_dim=32, **heads)
    assert plan.num_chunks != case.plan.num_chunks
    alone = [ops.plan_tree(case.page_table[i : i + 1], case.seq_lens[i : i + 1], page_size=16, head_dim=32, **heads)
             for i in range(4)]  # fmt: skip
    want = case.run()
    got = dataclasses.replace(case, plan=plan).run()
    assert all(map(torch.equal, got, want))
    for i, single in enumerate(alone):
        table, lens = case.page_table[i : i + 1], case.seq_lens[i : i + 1]
        got = ops.tree_attention(case.q[i : i + 1], case.k_pages, case.v_pages, table, lens, single)
        assert torch.equal(got[0][0], want[0][i])
        assert torch.equal(got[1][0], want[1][i])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    forests(max_rows=7, max_tokens=2600),
    st.sampled_from(DTYPES),
    st.sampled_from([24, 32]),  # without and with tile registers
    st.sampled_from([-1, 20, 700]),
    st.randoms(),
)
def test_a_query_does_not_depend_on_its_batch(isa, forest, dtype, head_dim, window_left, rng):
    """A query alone, among others, and with or without rows that share its pages gets the same bits."""
    page_table, seq_lens, q_lens, page_size = forest
    q_lens = (torch.ones_like(seq_lens) if q_lens is None else q_lens.clamp(max=9)).clamp(max=seq_lens)
    case = make_case(
        (page_table, seq_lens), q_lens, page_size=page_size, num_qo_heads=4, num_kv_heads=2, head_dim=head_dim,
        dtype=dtype,
        window_left=window_left,
    )  # fmt: skip
    out, lse = case.run()
    for row, (begin, end) in enumerate(pairwise(case.plan.q_indptr.tolist())):
        if begin == end:
            continue
        taken = rng.randint(1, end - begin)  # the row's first queries, before the others are there
        table, lens = case.page_table[row : row + 1], case.seq_lens[row : row + 1] - (end - begin - taken)
        plan = ops.plan_tree(
            table, lens, torch.tensor([taken], dtype=torch.int32), page_size=page_size, num_qo_heads=4, num_kv_heads=2,
            head_dim=head_dim,
        )  # fmt: skip
        q = case.q[begin : begin + taken]
        got = ops.tree_attention(q, case.k_pages, case.v_pages, table, lens, plan, window_left=window_left)
        assert torch.equal(got[0], out[begin : begin + taken])
        assert torch.equal(got[1], lse[begin : begin + taken])


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
def test_tokens_beyond_the_plan_belong_to_no_branch(module, sinks):
    case = make_case(ragged(tree_rows([2], [3, 1]), 16), [0, 2], sinks=sinks)
    assert_idle_tokens_are_left_out(case, lambda case: module.tree_attention(*case.args, **case.options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_permutation_of_the_branches_changes_no_bit(isa, dtype):
    case = interleaved_case(dtype=dtype)
    prompts = case.plan.order.view(3, 4) % 3
    assert prompts.equal(prompts[:, :1].expand(3, 4))
    assert_within_budget(case, case.run())
    for seed in range(3):
        again, tokens = permuted(case, seed)
        for got, want in zip(again.run(), case.run(), strict=True):
            assert got.equal(want[tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    case = make_case(ragged(tree_rows([2], [3, 1]), 16), dtype=dtype, sinks=torch.zeros(4))
    plan = case.plan
    args = (
        *case.args[:5],
        *plan.tensors,
        torch.zeros(case.q.shape, dtype=dtype),
        torch.zeros(case.q.shape[:2]),
        0.2,
        30,
        0.0,
        case.options["sinks"],
        True,
    )
    torch.library.opcheck(torch.ops.treedecode.tree_attention, args)
    torch.library.opcheck(torch.ops.treedecode.tree_attention, (*args[:12], None, *args[13:]))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
def test_writes_where_it_is_told(isa, sinks):
    case = make_case(ragged(tree_rows([3], [70, 2]), 16), sinks=sinks)
    want = case.run()
    memory, lse = (
        torch.full((2 * len(case.q) + 3, *case.q.shape[1:]), torch.nan),
        torch.full(case.q.shape[:2], torch.nan),
    )
    out = memory[2 : 2 + len(case.q)]
    got = ops.tree_attention(*case.args, **case.options, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert out.equal(want[0])
    assert lse.equal(want[1])
    assert memory[:2].isnan().all()
    assert memory[2 + len(case.q) :].isnan().all()
    again, none = ops.tree_attention(*case.args, **case.options, return_lse=False, checks_plan=False)
    assert none is None
    assert again.equal(want[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 8, 16, 128])
def test_null_pages_outside_the_window_are_not_read(isa, dtype, page_size):
    case = window_case(dtype, page_size)
    for got, want in zip(with_null_pages(case).run(), case.run(), strict=True):
        assert got.equal(want)
