"""The CUDA kernels of tree_attention, run on the host, against the reference with the error budget of the CPU op."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_library
from support import simt_kernels as simt
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
from support.attention_kernels import DTYPES, arguments, attend, flat_plan
from support.forests import as_tables, forests, tree_rows
from support.gpu_cases import on_gpu
from support.paths import ROOT

from treedecode import ops

HEADERS = {path.name for path in ROOT.glob("csrc/cuda/attention/*.cuh")}


@pytest.mark.parametrize(
    "shape",  # num_qo_heads, num_kv_heads, head_dim, page_size
    [(9, 3, 64, 16), (14, 2, 64, 8), (8, 2, 128, 16), (8, 1, 96, 32), (4, 4, 16, 1), (4, 2, 24, 64), (3, 1, 80, 8),
     (2, 2, 256, 16)],
    ids=lambda shape: "-".join(map(str, shape)),
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, shape):
    num_qo_heads, num_kv_heads, head_dim, page_size = shape
    sizes = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    case = make_case(two_trees_and_loners(page_size), page_size=page_size, dtype=dtype, **sizes)
    first = attend(case)
    assert_within_budget(case, first)
    for seed in simt.SEEDS[1:]:  # the same bits in any order of threads
        assert all(map(torch.equal, attend(case, seed=seed), first))


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
def test_options(dtype, options):
    forest = two_trees_and_loners(16)
    q_lens = [n if i == 1 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    for lens in (None, q_lens):
        case = make_case(forest, lens, dtype=dtype, **options)
        assert_within_budget(case, attend(case, num_workers=2, seed=2))


# 1 to 128 packed rows in a tile: all ways in which warps share the work
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("num_branches", [1, 16, 17, 32, 33, 64, 65, 100, 130])
def test_tiles_of_all_heights(num_branches, head_dim):
    case = make_case(
        ragged(tree_rows([num_branches], [9, 1]), 16), num_qo_heads=1, num_kv_heads=1, head_dim=head_dim,
        dtype=torch.bfloat16,
    )  # fmt: skip
    plan = flat_plan(case, 1)
    assert max(chunk.row_end - chunk.row_begin for chunk in plan.named_chunks()) == num_branches
    first = attend(case, plan=plan)
    assert_within_budget(case, first)
    assert all(map(torch.equal, attend(case, plan=plan, seed=3), first))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_beside_decode(dtype):
    long = list(range(22))
    rows = [long, [50, 51, 52], [50, 51, 53, 54], long[:6], [], [70]]
    forest = as_tables(rows, 16, [3, 16, 1, 16, 0, 9])
    for q_lens in ([339, 1, 1, 1, 0, 9], [300, 0, 7, 90, 0, 0], [1, 48, 49, 0, 0, 1]):
        case = make_case(forest, q_lens, num_qo_heads=2, num_kv_heads=1, dtype=dtype)
        assert_within_budget(case, attend(case, num_workers=3, seed=2))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_branches(dtype, page_size):
    """A chunk has many tiles of keys, a path has many chunks, and pages end anywhere in a tile."""
    pages = list(range(-(-900 // page_size)))
    rows = [pages, [*pages[: len(pages) // 2], *range(5000, 5000 + 300 // page_size)], pages]
    case = make_case(ragged(rows, page_size), [1, 2, 1], page_size=page_size, head_dim=64, dtype=dtype)
    for num_workers in (1, 16):
        assert_within_budget(case, attend(case, num_workers, seed=2))


@settings(max_examples=30, deadline=None)
@given(
    forests(max_rows=8, max_tokens=700),
    st.sampled_from([(3, 3), (9, 3), (7, 1)]),
    st.sampled_from([-1, 0, 50]),
    st.sampled_from([1, 4, 30]),
    st.sampled_from(list(DTYPES)),
)
def test_any_forest(forest, heads, window_left, num_workers, dtype):
    page_table, seq_lens, q_lens, page_size = forest
    if q_lens is not None:
        q_lens = q_lens.clamp(max=20)
    case = make_case(
        (page_table, seq_lens), q_lens, page_size=page_size, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=16,
        window_left=window_left, dtype=dtype,
    )  # fmt: skip
    assert_within_budget(case, attend(case, num_workers, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_and_rows_that_end_in_a_shared_page(dtype):
    pages = list(range(20))
    case = make_case(as_tables([pages[:9], pages, pages, pages, pages], 16, [5, 3, 16, 3, 1]), dtype=dtype)
    assert_within_budget(case, attend(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_does_not_matter(dtype):
    forest = two_trees_and_loners(16)
    nhd, hnd = (make_case(forest, dtype=dtype, layout=layout) for layout in ("NHD", "HND"))
    assert not hnd.k_pages.is_contiguous()
    assert all(map(torch.equal, attend(nhd), attend(hnd)))


def test_rows_that_are_not_aligned():
    """Such rows take the kernel without tensor cores, within the same budget."""
    case = make_case(two_trees_and_loners(16), dtype=torch.bfloat16)
    shifted = torch.cat([case.q.flatten()[:1], case.q.flatten()])[1:].view(case.q.shape)
    assert shifted.data_ptr() % 16 != 0
    assert_within_budget(case, attend(case, q=shifted, q_stride=shifted.stride()[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 16])
def test_a_permutation_of_the_branches_changes_no_bit(dtype, head_dim):
    case = interleaved_case(dtype=dtype, head_dim=head_dim)
    results = attend(case)
    assert_within_budget(case, results)
    for seed in (1, 2):
        again, tokens = permuted(case, seed)
        for got, want in zip(attend(again, seed=seed), results, strict=True):
            assert got.equal(want[tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_null_pages_outside_the_window_are_not_read(dtype, page_size):
    case = window_case(dtype, page_size)
    assert_within_budget(case, attend(with_null_pages(case)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0, 0.0, 9.0])], ids=["no sinks", "sinks"])
def test_without_keys(dtype, sinks):
    case = make_case(as_tables([[], [1], []], 16, [0, 3, 0]), [2, 1, 1], dtype=dtype, sinks=sinks)
    out, lse = attend(case)
    assert not out[[0, 1, 3]].any()
    assert torch.equal(lse[[0, 1, 3]], torch.full((3, 4), -torch.inf) if sinks is None else sinks.expand(3, 4))
    assert_within_budget(case, (out, lse))


@pytest.mark.parametrize("rows", [[], [[], []]])
def test_nothing_to_do(rows):
    case = make_case(as_tables(rows, 16, [0] * len(rows)), [0] * len(rows))
    out, lse = attend(case)
    assert out.shape == (0, 4, 32)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_page_id_out_of_range_is_marked(dtype):
    """The results of branches with such a page id are NaN, and no others."""
    case = make_case(as_tables([[0, 1], [2, 3], [4, 5]], 16, [16, 16, 16]), dtype=dtype)
    for page in (-1, len(case.k_pages), 2**31 - 1):
        page_table = case.page_table.clone()
        page_table[1, 1] = page
        out, lse = attend(case, page_table=page_table, plan=flat_plan(case, 4))
        assert all(t[1].isnan().all() for t in (out, lse))
        good = attend(case)
        for row in (0, 2):
            assert torch.equal(out[row], good[0][row])
            assert torch.equal(lse[row], good[1][row])


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
def test_tokens_beyond_the_plan_belong_to_no_branch(sinks):
    for q_lens in ([1, 2], [3, 0]):
        case = make_case(ragged(tree_rows([2], [3, 1]), 16), q_lens, dtype=torch.bfloat16, sinks=sinks)
        plan = flat_plan(case, 3)
        assert_idle_tokens_are_left_out(case, lambda case, plan=plan: attend(case, plan=plan))


def test_a_plan_that_does_not_fit_is_marked():
    case = make_case(two_trees_and_loners(16), dtype=torch.bfloat16)
    other = make_case(two_trees_and_loners(16), [min(n, 2) for n in case.seq_lens.tolist()], dtype=torch.bfloat16)
    small = make_case(two_trees_and_loners(8), page_size=8, dtype=torch.bfloat16)
    plans = [case.plan, flat_plan(other, 4), flat_plan(small, 4)]  # chained, of other queries, of other pages
    for plan in plans:
        out, lse = attend(case, plan=plan)
        assert all(t.isnan().all() for t in (out, lse))


def same(got, want):
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_barrier_is_needed(dtype):
    """Without the barrier the result is wrong, or depends on the order of threads."""
    runs, barriers = [], set()
    for change in ({}, {"window_left": 290}, {"num_pages": 20}):  # the last one: page ids out of range
        case = make_case(ragged(tree_rows([3], [20, 1]), 16), head_dim=64, dtype=dtype)
        fields = arguments(case, flat_plan(case, 2), **change)
        simt.barriers_seen()
        simt.run("tree_attention", **fields)
        barriers |= {site for site in simt.barriers_seen() if site.partition(":")[0] in HEADERS}
        runs.append((fields, {name: fields[name].clone() for name in ("out", "lse")}))
    assert len(barriers) >= 3

    def goes_wrong(barrier):
        for seed, (fields, want) in itertools.product(range(12), runs):
            simt.run("tree_attention", seed=seed, drop=barrier, **fields)
            if not all(same(fields[name], exact) for name, exact in want.items()):
                return True
        return False

    for barrier in sorted(barriers):
        assert simt.is_noticed(functools.partial(goes_wrong, barrier)), barrier


def on_device(case, num_workers):
    """Runs the ops themselves, and plan_tree before."""
    tensors = (t.cuda() for t in (*case.args[:5], case.plan.q_indptr.diff().int()))
    q, k_pages, v_pages, page_table, seq_lens, q_lens = tensors
    page_size, num_kv_heads, head_dim = k_pages.shape[1:]
    plan = ops.plan_tree(
        page_table, seq_lens, q_lens, page_size=page_size, num_qo_heads=q.shape[1], num_kv_heads=num_kv_heads,
        head_dim=head_dim, num_workers=num_workers,
    )  # fmt: skip
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    out, lse = ops.tree_attention(q, k_pages, v_pages, page_table, seq_lens, plan, **options)
    return out.cpu(), lse.cpu()


@on_gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_device(dtype, head_dim):
    options = {"window_left": 70, "logits_soft_cap": 20.0, "sinks": torch.tensor([0.5, -3.0, 6.0, -torch.inf])}
    forest = two_trees_and_loners(16)
    q_lens = [n if i == 1 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    wide = ragged(tree_rows([130], [90, 1]), 16)
    for case in (
        make_case(forest, dtype=dtype, head_dim=head_dim),
        make_case(forest, q_lens, dtype=dtype, head_dim=head_dim, **options),
        make_case(wide, dtype=dtype, head_dim=head_dim),
    ):
        first = on_device(case, 64)
        assert_within_budget(case, first)
        for _ in range(3):
            assert all(map(torch.equal, on_device(case, 64), first))


def call(**changes):
    case = make_case(as_tables([[1, 2, 3], [1, 2, 4]], 16, [8, 5]))
    plan = flat_plan(case, 4)
    args = {
        "q": case.q, "k_pages": case.k_pages, "v_pages": case.v_pages, "page_table": case.page_table,
        "seq_lens": case.seq_lens, "q_indptr": plan.q_indptr, "part_indptr": plan.part_indptr, "chunks": plan.chunks,
        "counts": plan.counts, "order": plan.order, "row_indptr": plan.row_indptr,
        "out": torch.empty_like(case.q), "lse": None, "sm_scale": 0.1, "window_left": -1, "logits_soft_cap": 0.0,
        "sinks": None, "checks_plan": True,
    }  # fmt: skip
    return cuda_library.call("tree_attention", *(args | changes).values())


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "q: expected a CUDA tensor, got cpu"),
        ({"q": torch.zeros(2, 4)}, ValueError, r"q: expected shape \[num_q, num_qo_heads, head_dim\]"),
        ({"q": torch.zeros(2, 4, 32).double()}, TypeError, "q: expected dtype float32, bfloat16 or float16"),
        ({"q": torch.zeros(2, 3, 32)}, ValueError, "q: expected num_qo_heads a positive multiple of .* = 2, got 3"),
        ({"q": torch.zeros(2, 4, 30)}, ValueError, "q: expected head_dim a multiple of 8 up to 256, got 30"),
        ({"k_pages": torch.zeros(9, 16, 2, 32).half()}, TypeError, "k_pages: expected dtype float32, got float16"),
        ({"page_table": torch.zeros(2, 3)}, TypeError, "page_table: expected dtype int32, got float32"),
        ({"window_left": -2}, ValueError, "window_left: expected -1 .* or more, got -2"),
        ({"sm_scale": 1e-46}, ValueError, "sm_scale: expected a positive number of the range of fp32"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \[num_qo_heads\] = \[4\], got \[3\]"),
        ({"counts": torch.zeros(5, dtype=torch.int32)}, ValueError, r"plan.counts: expected shape \[6\]"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        call(**change)
