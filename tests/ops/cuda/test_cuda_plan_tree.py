"""The CUDA kernels of plan_tree, run on the host: they make the flat plan of the reference to the last number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_library, plan_cases
from support import simt_kernels as simt
from support.forests import UNUSED, as_tables, forests, tree_rows
from support.gpu_cases import on_gpu
from support.plan_cases import GOLDEN, HEADS
from support.tensors import int32

from treedecode import ops, reference

SEGMENT = 2048  # page ids that a block compares


def scratch_words(num_rows, max_pages):
    width = 1
    while width < num_rows + 1:
        width *= 2
    tree = 4 * width + 20 * num_rows + 2 if num_rows > 1024 else 0
    return num_rows * -(-max_pages // SEGMENT) + tree


def fields_of(page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, num_workers):
    """Returns the params of the launcher, with outputs full of -1."""
    num_rows, max_pages = page_table.shape
    workers = max(1, num_workers // num_kv_heads)
    max_chunks = max(0, 2 * num_rows - 1) + (4 * workers if num_rows else 0)
    shapes = [(num_rows + 1,), (num_rows + 1,), (max_chunks, 6), (6,), (num_rows,), (num_rows + 1,)]
    q_indptr, part_indptr, chunks, counts, order, row_indptr = (
        torch.full(shape, -1, dtype=torch.int32) for shape in shapes
    )
    return {
        "page_table": page_table, "seq_lens": seq_lens, "q_lens": q_lens, "q_indptr": q_indptr,
        "part_indptr": part_indptr, "order": order, "row_indptr": row_indptr, "chunks": chunks, "counts": counts,
        "scratch": torch.full((scratch_words(num_rows, max_pages),), -1, dtype=torch.int32),
        "hashes": torch.full((num_rows, max_pages // 16), -1), "hash_mask": 2**64 - 1, "num_rows": num_rows,
        "max_pages": max_pages, "table_stride": page_table.stride(0), "page_size": page_size,
        "group_size": num_qo_heads // num_kv_heads, "workers": workers,
    }  # fmt: skip


def run(*args, hash_mask=2**64 - 1, **how):
    """Runs the kernels; returns the plan's tensors."""
    fields = fields_of(*args) | {"hash_mask": hash_mask}
    simt.run("plan_tree", **how, **fields)
    return tuple(fields[name] for name in ("q_indptr", "part_indptr", "chunks", "counts", "order", "row_indptr"))


def plain(*tensors):
    return plan_cases.plain(ops.TreePlan(*tensors))


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from(HEADS), st.sampled_from([1, 30, 264]), st.sampled_from(simt.SEEDS))
def test_matches_reference(forest, heads, num_workers, seed):
    page_table, seq_lens, q_lens, page_size = forest
    got = run(page_table, seq_lens, q_lens, page_size, *heads, num_workers, seed=seed)
    want = reference.plan_tree(page_table, seq_lens, q_lens, page_size, *heads, 64, num_workers)
    assert plain(*got) == [t.tolist() for t in want]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden(case):
    page_table = torch.full((len(case["pages"]), case["max_pages"]), UNUSED, dtype=torch.int32)
    for table_row, row in zip(page_table, case["pages"], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor(case["seq_lens"], dtype=torch.int32)
    q_lens = None if case["q_lens"] is None else torch.tensor(case["q_lens"], dtype=torch.int32)
    heads = case["num_qo_heads"], case["num_kv_heads"]
    for flat in case["flat"]:
        got = run(page_table, seq_lens, q_lens, case["page_size"], *heads, flat["num_workers"])
        assert plain(*got) == plan_cases.golden_plan(case, flat)


def native(page_table, seq_lens, q_lens, page_size, num_qo_heads, num_kv_heads, num_workers):
    plan = ops.plan_tree(
        page_table, seq_lens, q_lens, page_size=page_size, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads,
        head_dim=64, num_workers=num_workers,
    )  # fmt: skip
    return plain(*plan.tensors)


@pytest.mark.parametrize("seed", range(20))
def test_hashes_that_collide_cost_sharing_alone(seed):
    """With hashes of one bit, rows that differ look alike, and the order may leave branches out."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [*range(16 * int(n)), *torch.randint(0, 2, (40,), generator=generator).tolist()]
        for n in torch.randint(0, 4, (12,), generator=generator)
    ]
    page_table, seq_lens = as_tables(rows, 16, [16] * 12)
    num_missing = 0
    for mask in (0, 1):
        plan = ops.TreePlan(*run(page_table, seq_lens, None, 16, 4, 2, 8, hash_mask=mask))
        order = plan.order.tolist()
        assert sorted(order) == list(range(12))
        paths = [[] for _ in rows]
        for chunk in plan.named_chunks():
            shared = {tuple(rows[order[i]][: -(-chunk.token_end // 16)]) for i in range(chunk.row_begin, chunk.row_end)}
            assert len(shared) == 1
            for i in range(chunk.row_begin, chunk.row_end):
                paths[order[i]].append((chunk.part, chunk.token_begin, chunk.token_end))
        for row, path in enumerate(paths):
            borders = [0, *(end for _, _, end in sorted(path))]
            assert [begin for _, begin, _ in sorted(path)] == borders[:-1]
            assert borders[-1] == seq_lens[row]
        num_missing += order == list(range(12)) and plan.unique_tokens == plan.path_tokens
    unmasked = ops.TreePlan(*run(page_table, seq_lens, None, 16, 4, 2, 8))
    assert unmasked.unique_tokens <= plan.unique_tokens


@pytest.mark.parametrize("num_rows", [600, 1023, 1024, 1025, 1500])
def test_more_rows_than_threads(num_rows):
    """The tree is in shared memory up to 1024 rows, and in scratch beyond."""
    rows = tree_rows([5, 10, 30], [3, 2, 1, 1])[:num_rows]
    args = *as_tables(rows, 16, [1 + i % 16 for i in range(num_rows)]), None, 16, 8, 2, 264
    assert plain(*run(*args)) == native(*args)


@pytest.mark.parametrize("step", [1, 2])
def test_one_row_after_the_other_forks(step):
    """The tree is a comb, which is the deepest one, and its shared prefix grows or shrinks."""
    rows = [[*range(i + 1), 1000 + i] for i in range(0, 150, step)]
    for comb in (rows, rows[::-1]):
        args = *as_tables(comb, 64, [64] * len(comb)), None, 64, 4, 4, 264
        assert plain(*run(*args, seed=2)) == native(*args)


@pytest.mark.parametrize("differs_at", [0, 1, 2047, 2048, 2049, 4095, 4096, 4999, 5000])
def test_long_tables(differs_at):
    """Several blocks compare two rows, whose pages may be equal again after the first that differs."""
    pages = torch.arange(5000, dtype=torch.int32)
    page_table = torch.stack([pages, pages])
    if differs_at < 5000:
        page_table[1, differs_at] += 10000
    args = page_table, torch.tensor([5000, 4990], dtype=torch.int32), None, 1, 4, 4, 264
    assert plain(*run(*args)) == native(*args)


def test_reads_nothing_beyond_seq_len():
    """Table entries after a row's pages may be equal, and the table may end there."""
    page_table, seq_lens = as_tables([[1, 2], [1, 3], [1]], 16, [16, 16, 3])
    for fill in (UNUSED, -1, 7):
        table = page_table.masked_fill(page_table == UNUSED, fill)
        assert plain(*run(table, seq_lens, None, 16, 4, 4, 8)) == native(page_table, seq_lens, None, 16, 4, 4, 8)
    wide = torch.full((3, 5), 5, dtype=torch.int32)
    wide[:, :2] = page_table
    assert plain(*run(wide[:, :2], seq_lens, None, 16, 4, 4, 8)) == native(page_table, seq_lens, None, 16, 4, 4, 8)


@pytest.mark.parametrize("rows", [[], [[]], [[], [1], []]])
def test_little_to_plan(rows):
    args = *as_tables(rows, 16, [0 if not row else 9 for row in rows]), None, 16, 4, 2, 8
    assert plain(*run(*args)) == native(*args)


def test_lengths_that_the_cpu_refuses_are_clamped():
    """The plan is that of lengths clamped to the table's width, to the row's tokens, or to 0."""
    page_table, _ = as_tables(tree_rows([3], [4, 2]), 16, [16] * 3)
    wrong = torch.tensor([2**31 - 1, -5, 96], dtype=torch.int32), torch.tensor([97, 3, -1], dtype=torch.int32)
    right = torch.tensor([96, 0, 96], dtype=torch.int32), torch.tensor([96, 3, 0], dtype=torch.int32)
    assert plain(*run(page_table, *wrong, 16, 4, 2, 8)) == native(page_table, *right, 16, 4, 2, 8)


def test_counts_that_do_not_fit_are_marked():
    page_table = torch.arange(3 * (1 << 10), dtype=torch.int32).view(3, -1)
    plan = ops.TreePlan(*run(page_table, torch.full((3,), 1 << 30, dtype=torch.int32), None, 1 << 20, 4, 4, 8))
    assert plan.num_chunks == -1


def test_every_barrier_is_needed():
    """Without the barrier the plan is wrong in some order of threads."""

    def forest(num_inner):  # roots that only pay with all of their children
        rows = []
        for i in range(num_inner):
            path = [*range(i // 20 * 8, i // 20 * 8 + 8), i // 5 + 10_000, i + 20_000]
            rows += [[*path, 30_000 + 2 * i + j] for j in range(2)]
        return *as_tables(rows, 64, [64] * len(rows)), None, 64, 8, 2, 64

    cases = [(args, native(*args)) for args in (forest(40), forest(300))]  # the second: several nodes to a thread
    simt.barriers_seen()
    for args, want in cases:
        assert plain(*run(*args)) == want
    barriers = [site for site in simt.barriers_seen() if site.startswith("plan_tree.cuh")]
    assert len(barriers) >= 6
    for barrier in barriers:

        def goes_wrong(barrier=barrier):
            return any(
                plain(*run(*args, seed=seed, drop=barrier)) != want for seed in range(12) for args, want in cases
            )

        assert simt.is_noticed(goes_wrong), barrier


@on_gpu
@settings(max_examples=200, deadline=None)
@given(forests(), st.sampled_from(HEADS), st.sampled_from([1, 30, 264]))
def test_on_a_device(forest, heads, num_workers):
    page_table, seq_lens, q_lens, page_size = forest
    on_device = (None if t is None else t.cuda() for t in (page_table, seq_lens, q_lens))
    got = native(*on_device, page_size, *heads, num_workers)
    assert got == native(page_table, seq_lens, q_lens, page_size, *heads, num_workers)


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "page_table: expected a CUDA tensor, got cpu"),
        ({"num_workers": 0}, ValueError, "num_workers: expected 1 or more on a GPU .*, got 0"),
        ({"page_table": torch.zeros(2, 4)}, TypeError, "page_table: expected dtype int32, got float32"),
        ({"seq_lens": int32(5)}, ValueError, r"seq_lens: expected shape \[num_branches\] = \[2\], got \[1\]"),
        ({"q_lens": int32(1, 1).long()}, TypeError, "q_lens: expected dtype int32, got int64"),
        ({"page_size": 0}, ValueError, "page_size: expected a positive number, got 0"),
        ({"num_qo_heads": 3}, ValueError, "num_qo_heads: expected a multiple of num_kv_heads, got 3"),
        ({"num_workers": -1}, ValueError, "num_workers: expected 0 .* or more, got -1"),
        ({"head_dim": 100}, ValueError, "head_dim: expected a multiple of 8 up to 256, got 100"),
    ],
)
def test_bad_arguments(change, error, message):
    args = {
        "page_table": torch.zeros(2, 4, dtype=torch.int32), "seq_lens": int32(5, 20), "q_lens": None, "page_size": 16,
        "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "num_workers": 8,
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        cuda_library.call("plan_tree", *args.values())
