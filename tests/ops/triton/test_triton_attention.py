"""The Triton kernels of tree_attention and plan_tree, in the interpreter, and compiled for every target."""

import dataclasses
import itertools

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import (
    assert_idle_tokens_are_left_out,
    assert_within_budget,
    interleaved_case,
    make_case,
    permuted,
    ragged,
    window_case,
    with_null_pages,
)
from support.forests import UNUSED, as_tables, forests, tree_rows
from support.plan_cases import GOLDEN, HEADS, golden_plan, plain
from support.triton_cases import IS_3_6, assert_same_error, compile_all

from treedecode import ops, triton_kernels
from treedecode.triton_kernels import row_order, tree_attention

FP32, FP16 = torch.float32, torch.float16  # bf16 is wrong in the interpreter, see test_triton_kernels.py
SHAPES = [  # dtype, num_qo_heads, num_kv_heads, head_dim, page_size
    (FP32, 4, 2, 64, 16),
    (FP16, 4, 2, 64, 16),
    (FP16, 7, 1, 80, 1),
    (FP32, 3, 1, 8, 24),
    (FP16, 1, 1, 128, 64),
    (FP32, 2, 1, 256, 32),
    (FP16, 3, 1, 96, 128),
]


def flat(case, num_workers):
    """Returns the case with a flat plan."""
    page_size, num_kv_heads, head_dim = case.k_pages.shape[1:]
    plan = ops.plan_tree(
        case.page_table, case.seq_lens, case.plan.q_indptr.diff(), page_size=page_size, head_dim=head_dim,
        num_qo_heads=case.q.shape[1], num_kv_heads=num_kv_heads, num_workers=num_workers,
    )  # fmt: skip
    return dataclasses.replace(case, plan=plan)


def launch(case):
    """Runs the launcher as `ops.tree_attention` does with CUDA tensors."""
    options = {"sm_scale": None, "window_left": -1, "logits_soft_cap": 0.0, "sinks": None} | case.options
    if options["sm_scale"] is None:
        options["sm_scale"] = case.q.shape[-1] ** -0.5
    out, lse = torch.full_like(case.q, torch.nan), torch.full(case.q.shape[:2], torch.nan)
    results = (out.contiguous(), lse)
    triton_kernels.launcher("tree_attention")(*case.args[:5], *case.plan.tensors, *results, *options.values(), True)
    return results


def test_lse_is_left_out_on_request():
    case = flat(make_case(ragged(tree_rows([3], [4, 2]), 16), sinks=torch.zeros(4)), 8)
    want, _ = launch(case)
    out = torch.full(case.q.shape, torch.nan)
    numbers = (case.q.shape[-1] ** -0.5, -1, 0.0, case.options["sinks"])
    triton_kernels.launcher("tree_attention")(*case.args[:5], *case.plan.tensors, out, None, *numbers, True)
    assert out.equal(want)


def num_parts(case):
    """Returns the numbers of partial results that query tokens have."""
    parts, queries = case.plan.part_indptr.diff(), case.plan.q_indptr.diff()
    return {int(n) // int(q) for n, q in zip(parts, queries, strict=True) if q}


def small_forest(page_size):
    """A forest: three levels, a row that ends where others go on, rows that share little, a single and an empty row."""
    unit = max(1, 32 // page_size)
    deep = tree_rows([2, 2], [4 * unit, 2 * unit, 1])
    return ragged([*deep, deep[-1][: 2 * unit], [2000, 2001], [2000, 2002], [5000], []], page_size)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_decode(shape):
    dtype, num_qo_heads, num_kv_heads, head_dim, page_size = shape
    sizes = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    case = flat(make_case(small_forest(page_size), page_size=page_size, dtype=dtype, **sizes), 4)
    assert num_parts(case) > {0, 1}
    assert_within_budget(case, launch(case))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (FP32, {"window_left": 0}),
        (FP16, {"window_left": 40}),
        (FP32, {"logits_soft_cap": 2.5}),
        (FP32, {"sinks": torch.tensor([0.5, -3.0, 6.0, -torch.inf])}),
        (FP16, {"window_left": 33, "logits_soft_cap": 30.0, "sinks": torch.tensor([1.0, 2.0, 3.0, 4.0])}),
    ],
)
def test_options(dtype, options):
    forest = small_forest(16)
    q_lens = [n if i == 5 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    for lens in (None, q_lens):
        case = flat(make_case(forest, lens, dtype=dtype, num_kv_heads=1, head_dim=16, **options), 2)
        assert len(num_parts(case)) > 1
        assert_within_budget(case, launch(case))


def test_tiles_of_every_height():
    rows = tree_rows([4], [9, 1])
    forest = ragged([*rows, [500], list(range(600, 605))], 16)
    case = flat(make_case(forest, [1, 12, 8, 1, 2, 70], num_qo_heads=4, num_kv_heads=1, head_dim=16, dtype=FP16), 4)
    q_indptr, chunks = case.plan.q_indptr.tolist(), case.plan.named_chunks()
    packed = [4 * (q_indptr[chunk.row_end] - q_indptr[chunk.row_begin]) for chunk in chunks]
    assert {min(128, max(16, triton.next_power_of_2(n))) for n in packed} == {16, 32, 64, 128}
    assert max(packed) > 128  # two tiles
    assert tree_attention.config(16, FP16, "cpu", 256).heights == (16, 32, 64, 128)
    assert_within_budget(case, launch(case))


def test_one_branch_in_many_parts():
    case = make_case(as_tables([list(range(33))], 16, [5]), num_qo_heads=2, num_kv_heads=1, head_dim=16)
    case = flat(case, 30)
    assert num_parts(case) == {5}
    out, lse = launch(case)
    assert_within_budget(case, (out, lse))
    again = launch(case)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


def test_rows_in_any_order_and_any_layout():
    page_table, seq_lens = small_forest(16)
    order = torch.randperm(len(seq_lens), generator=torch.Generator().manual_seed(1))
    for layout in ("NHD", "HND"):
        case = make_case((page_table[order], seq_lens[order]), dtype=FP16, head_dim=16, layout=layout)
        assert_within_budget(case, launch(flat(case, 8)))


@settings(max_examples=12, deadline=None)
@given(forests(max_rows=5, max_tokens=300), st.sampled_from([(2, 1), (2, 2)]), st.sampled_from([1, 9]))
def test_any_forest(forest, heads, num_workers):
    page_table, seq_lens, q_lens, page_size = forest
    if q_lens is not None:
        q_lens = q_lens.clamp(max=9)
    case = make_case(
        (page_table, seq_lens), q_lens, page_size=page_size, num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=8
    )
    case = flat(case, num_workers)
    assert_within_budget(case, launch(case))


def test_without_keys():
    for sinks in (None, torch.tensor([1.0, -2.0, 0.0, 9.0])):
        case = flat(make_case(as_tables([[], [1], []], 16, [0, 3, 0]), [2, 1, 1], head_dim=16, sinks=sinks), 2)
        out, lse = launch(case)
        assert not out[[0, 1, 3]].any()
        assert torch.equal(lse[[0, 1, 3]], torch.full((3, 4), -torch.inf) if sinks is None else sinks.expand(3, 4))
        assert_within_budget(case, (out, lse))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
def test_tokens_beyond_the_plan_belong_to_no_branch(sinks):
    for q_lens in ([1, 2], [3, 0]):
        case = flat(make_case(ragged(tree_rows([2], [3, 1]), 16), q_lens, head_dim=16, sinks=sinks), 3)
        assert_idle_tokens_are_left_out(case, launch)


def test_a_plan_for_something_else_gives_nan():
    chained = make_case(small_forest(16), head_dim=16)
    case = flat(chained, 2)
    wider = dataclasses.replace(case, k_pages=case.k_pages.repeat(1, 2, 1, 1), v_pages=case.v_pages.repeat(1, 2, 1, 1))
    shorter = dataclasses.replace(case, q=case.q[1:])
    for bad in (chained, wider, shorter):
        for result in launch(bad):
            assert result.isnan().all()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_plans(case):
    page_table = torch.full((len(case["pages"]), case["max_pages"]), UNUSED, dtype=torch.int32)
    for table_row, row in zip(page_table, case["pages"], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor(case["seq_lens"], dtype=torch.int32)
    q_lens = None if case["q_lens"] is None else torch.tensor(case["q_lens"], dtype=torch.int32)
    for want in case["flat"]:
        heads = case["num_qo_heads"], case["num_kv_heads"]
        args = (page_table, seq_lens, q_lens, case["page_size"], *heads, 64, want["num_workers"])
        plan = ops.TreePlan(*triton_kernels.launcher("plan_tree")(*args))
        assert plain(plan) == golden_plan(case, want)


@settings(max_examples=25, deadline=None)
@given(forests(max_rows=16, max_tokens=900), st.sampled_from(HEADS), st.sampled_from([1, 30, 264]))
def test_any_plan(forest, heads, num_workers):
    args = (*forest, *heads, 64, num_workers)
    plan = ops.TreePlan(*triton_kernels.launcher("plan_tree")(*args))
    want = ops.TreePlan(*torch.ops.treedecode.plan_tree(*args))
    assert plain(plan) == plain(want)
    assert plan.chunks.shape == want.chunks.shape
    num_q, group = int(plan.q_indptr[-1]), heads[0] // heads[1]
    if len(forest[1]):
        workers, max_parts = tree_attention.bounds(num_q, len(forest[1]), plan.chunks.shape[0], group)
        assert workers == max(1, num_workers // heads[1])
        assert plan.num_parts <= max_parts


def test_plans_of_more_rows_than_a_block():
    rows = tree_rows([5, 3, 18], [3, 2, 1, 1])
    page_table, seq_lens = as_tables(rows, 16, [1 + i % 16 for i in range(270)])
    q_lens = torch.tensor([i % 3 for i in range(270)], dtype=torch.int32)
    args = (page_table, seq_lens, q_lens, 16, 8, 2, 64, 30)
    want = ops.TreePlan(*torch.ops.treedecode.plan_tree(*args))
    assert plain(ops.TreePlan(*triton_kernels.launcher("plan_tree")(*args))) == plain(want)


def num_common(first, second):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@pytest.mark.parametrize("seed", range(6))
def test_hashes_that_collide_leave_no_branch_out(seed):
    """Without hashes rows that differ look alike; an order that leaves branches out is replaced, and shares nothing."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 3, (12, 1), generator=generator)
    page_table = torch.cat([(starts * 100 + torch.arange(16)), torch.randint(0, 2, (12, 40), generator=generator)], 1)
    page_table = page_table[:, torch.randperm(56, generator=generator)].int().contiguous()
    seq_lens = torch.randint(1, 57, (12,), generator=generator, dtype=torch.int32) * 16
    for mask in (0, 1, -1):
        order, shared = torch.full((2, 12), -1, dtype=torch.int32)
        row_order.order_rows(order, shared, page_table, seq_lens, 16, mask)
        assert sorted(order.tolist()) == list(range(12))
        pages = [page_table[i, : seq_lens[i] // 16].tolist() for i in order]
        common = [num_common(*pair) for pair in itertools.pairwise(pages)]
        assert shared.tolist() in ([0, *common], [0] * 12)
    assert pages == sorted(pages)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_a_permutation_of_the_branches_changes_no_bit(dtype):
    case = interleaved_case(dtype=dtype)
    results = launch(flat(case, 8))
    assert_within_budget(case, results)
    again, tokens = permuted(case, seed=1)
    for got, want in zip(launch(flat(again, 8)), results, strict=True):
        assert got.equal(want[tokens])


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_null_pages_outside_the_window_are_not_read(dtype, page_size):
    case = window_case(dtype, page_size)
    assert_within_budget(case, launch(flat(with_null_pages(case), 8)))


def test_plan_lengths_out_of_range_stay_in_bounds():
    page_table = torch.tensor([[1, 2], [1, 2], [1, 3]], dtype=torch.int32)
    seq_lens = torch.tensor([-5, 2**31 - 1, 20], dtype=torch.int32)
    q_lens = torch.tensor([-1, 2**31 - 1, 30], dtype=torch.int32)
    got = triton_kernels.launcher("plan_tree")(page_table, seq_lens, q_lens, 16, 4, 2, 64, 8)
    in_range = torch.tensor([0, 32, 20], dtype=torch.int32)
    want = torch.ops.treedecode.plan_tree(page_table, in_range, in_range, 16, 4, 2, 64, 8)
    assert plain(ops.TreePlan(*got)) == plain(ops.TreePlan(*want))


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


BAD = {
    "plan_tree": [
        {"page_table": torch.zeros(2, 4)}, {"page_table": int32(2)}, {"page_table": int32(4, 2).t()},
        {"seq_lens": int32(3)}, {"seq_lens": torch.zeros(2).long()}, {"seq_lens": int32(4)[::2]},
        {"q_lens": int32(1)}, {"page_size": 0}, {"num_kv_heads": 0}, {"num_qo_heads": 3}, {"head_dim": 0},
        {"head_dim": 4}, {"head_dim": 20}, {"head_dim": 264},
    ],
    "tree_attention": [
        {"q": torch.zeros(2, 4)}, {"q": torch.zeros(2, 4, 16).double()}, {"q": torch.zeros(2, 3, 16)},
        {"q": torch.zeros(2, 0, 16)}, {"q": torch.zeros(2, 4, 12)}, {"q": torch.zeros(2, 4, 264)},
        {"q": torch.zeros(2, 4, 32)[..., ::2]}, {"k_pages": torch.zeros(3, 8, 2, 24)},
        {"k_pages": torch.zeros(3, 8, 2, 16).half()}, {"v_pages": torch.zeros(3, 4, 2, 16)},
        {"k_pages": torch.zeros(3, 0, 2, 16), "v_pages": torch.zeros(3, 0, 2, 16)},
        {"page_table": torch.zeros(2, 1)}, {"page_table": int32(2)}, {"seq_lens": int32(3)},
        {"q_indptr": int32(2)}, {"part_indptr": torch.zeros(3)}, {"chunks": int32(4, 5)}, {"counts": int32(5)},
        {"order": int32(3)}, {"row_indptr": int32(2)}, {"order": int32(2).long()},
        {"out": torch.zeros(3, 4, 16)}, {"out": torch.zeros(2, 4, 16).half()}, {"out": torch.zeros(4, 4, 16)[::2]},
        {"out": torch.zeros(2, 16, 4).mT}, {"lse": torch.zeros(2, 3)}, {"lse": torch.zeros(2, 4).half()},
        {"sm_scale": 0.0}, {"sm_scale": float("nan")}, {"logits_soft_cap": -1.0}, {"logits_soft_cap": 1e39},
        {"window_left": -2}, {"sinks": torch.zeros(3)}, {"sinks": torch.zeros(4).half()},
    ],
}  # fmt: skip


def good_arguments(op):
    if op == "plan_tree":
        return {"page_table": int32(2, 4), "seq_lens": int32(2) + 5, "q_lens": None, "page_size": 8, "num_qo_heads": 4,
                "num_kv_heads": 2, "head_dim": 16, "num_workers": 2}  # fmt: skip
    table, lens = torch.tensor([[1], [2]], dtype=torch.int32), int32(2) + 5
    plan = torch.ops.treedecode.plan_tree(table, lens, None, 8, 4, 2, 16, 2)
    return {"q": torch.zeros(2, 4, 16), "k_pages": torch.zeros(3, 8, 2, 16), "v_pages": torch.zeros(3, 8, 2, 16),
            "page_table": table, "seq_lens": lens,
            **dict(zip((field.name for field in dataclasses.fields(ops.TreePlan)), plan, strict=True)),
            "out": torch.empty(2, 4, 16), "lse": torch.empty(2, 4), "sm_scale": 0.25, "window_left": -1,
            "logits_soft_cap": 0.0, "sinks": None, "checks_plan": True}  # fmt: skip


@pytest.mark.parametrize(("op", "change"), [(op, change) for op in BAD for change in BAD[op]])
def test_same_errors_as_the_native_op(op, change):
    assert_same_error(op, good_arguments(op), change)


def test_makes_flat_plans_only():
    args = good_arguments("plan_tree") | {"num_workers": 0}
    with pytest.raises(ValueError, match=r"num_workers: expected a positive number .* got 0"):
        triton_kernels.launcher("plan_tree")(*args.values())


@pytest.mark.slow
def test_compiles_for_every_target_without_spills():
    rows = compile_all("triton_compile_attention.py")
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    shared = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
    stack = {"sm_80": 16, "sm_90": 32, "sm_100": 120} if IS_3_6 else {}  # bytes
    for row in rows:
        assert row["stack"] <= (stack.get(row["target"], 0) if row["op"] == "tree_attention" else 0), row
        assert row.get("vgpr_spill_count", 0) == 0, row
        assert row["shared"] <= shared[row["target"]] << 10, row
        if row["op"] == "tree_attention" and row["dtype"] == "bf16":
            assert row["mma"] > 0, row
            # what the loads of K and V become when they are pipelined
            assert (row["async_copies"] > 0) == (row["target"].startswith("sm") and row["stages"] > 1), row
