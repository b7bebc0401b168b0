from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.forests import UNUSED, as_tables, forests, tree_rows
from support.plan_cases import GOLDEN, HEADS, LONG_PREFILLS, chunks_of, golden_plan, plain, plan_of
from support.tensors import int32

from treedecode import ops, reference
from treedecode.reference.plan_tree import ChainedChunk

ROW_END = ChainedChunk._fields.index("row_end")  # the same column in a flat plan


@settings(max_examples=300, deadline=None)
@given(forests(), st.sampled_from(HEADS), st.sampled_from([0, 1, 30, 264]))
def test_matches_reference(forest, heads, num_workers):
    page_table, seq_lens, q_lens, page_size = forest
    got = plan_of(page_table, seq_lens, q_lens, page_size, *heads, num_workers)
    want = reference.plan_tree(page_table, seq_lens, q_lens, page_size, *heads, 64, num_workers)
    assert plain(got) == [t.tolist() for t in want]


@settings(max_examples=300, deadline=None)
@given(forests(), st.sampled_from(HEADS))
@example((*LONG_PREFILLS, LONG_PREFILLS[1], 64), (1, 1))  # so much work that cost alone would leave chunks too long
def test_invariants_of_a_chained_plan(forest, heads):
    page_table, seq_lens, q_lens, page_size = forest
    plan = plan_of(page_table, seq_lens, q_lens, page_size, *heads)
    num_rows = len(seq_lens)
    branch_q_len = [1] * num_rows if q_lens is None else q_lens.tolist()
    branch_len = seq_lens.tolist()
    order = plan.order.tolist()
    assert sorted(order) == list(range(num_rows))
    page_table = page_table[order]
    q_len, seq_len = ([of[branch] for branch in order] for of in (branch_q_len, branch_len))
    chunks = plan.named_chunks()
    assert plan.num_chunks <= plan.chunks.shape[0]
    paths = [[] for _ in range(num_rows)]
    for row_begin, row_end, token_begin, token_end, segment, number in chunks:
        assert 0 <= row_begin < row_end <= num_rows
        assert segment * 1024 <= token_begin < token_end <= (segment + 1) * 1024
        assert token_begin % 2 == 0
        pages = page_table[row_begin:row_end, token_begin // page_size : -(-token_end // page_size)]
        assert (pages == pages[0]).all()
        assert (pages != UNUSED).all()
        rows = [row for row in range(row_begin, row_end) if q_len[row] > 0]
        assert token_end <= max(seq_len[row] for row in rows)
        for row in rows:
            assert token_begin < seq_len[row]
            paths[row].append((token_begin, min(token_end, seq_len[row]), number))
    for row, path in enumerate(paths):
        path.sort()
        borders = [0, *(end for _, end, _ in path)]
        assert [begin for begin, _, _ in path] == borders[:-1]
        assert borders[-1] == (seq_len[row] if q_len[row] > 0 else 0)
        number = 0
        for begin, _, got in path:
            number = 0 if begin % 1024 == 0 else number + 1
            assert got == number
    assert [chunk.round for chunk in chunks] == sorted(chunk.round for chunk in chunks)
    assert plan.q_indptr.diff().tolist() == branch_q_len
    assert plan.row_indptr.diff().tolist() == q_len
    parts = [q * -(-n // 1024) for q, n in zip(branch_q_len, branch_len, strict=True)]
    assert plan.part_indptr.diff().tolist() == parts
    assert plan.q_indptr[0] == plan.part_indptr[0] == plan.row_indptr[0] == 0
    assert plan.num_chunks == len(chunks)
    assert plan.num_parts == plan.part_indptr[-1]
    assert plan.unique_tokens == sum(chunk.token_end - chunk.token_begin for chunk in chunks)
    assert plan.path_tokens == sum(n for n, q in zip(seq_len, q_len, strict=True) if q > 0)
    assert plan.page_size == page_size
    assert plan.num_tiles == 0
    assert plan.unique_tokens <= plan.path_tokens


@settings(max_examples=300, deadline=None)
@given(forests(), st.sampled_from(HEADS), st.sampled_from([1, 30, 264]))
@example((*LONG_PREFILLS, LONG_PREFILLS[1], 64), (1, 1), 264)
def test_invariants_of_a_flat_plan(forest, heads, num_workers):
    page_table, seq_lens, q_lens, page_size = forest
    plan = plan_of(page_table, seq_lens, q_lens, page_size, *heads, num_workers)
    order = plan.order.tolist()
    assert sorted(order) == list(range(len(seq_lens)))
    page_table, seq_lens = page_table[order], seq_lens[order]
    q_len = plan.row_indptr.diff().tolist()
    assert plan.q_indptr.diff()[order].tolist() == q_len
    group, workers = heads[0] // heads[1], max(1, num_workers // heads[1])
    paths = [[] for _ in q_len]
    num_tiles = 0
    for row_begin, row_end, token_begin, token_end, part, tile_begin in plan.named_chunks():
        assert tile_begin == num_tiles
        assert page_size > 64 or token_begin < min(seq_lens[row_begin:row_end].tolist())
        pages = page_table[row_begin:row_end, token_begin // page_size : -(-token_end // page_size)]
        rows = [row for row in range(row_begin, row_end) if q_len[row] > 0 and seq_lens[row] > 0]
        assert (pages[[row - row_begin for row in rows]] == pages[rows[0] - row_begin]).all()
        packed = group * sum(q_len[row] for row in rows)
        num_tiles += -(-packed // 128)
        for row in rows:
            paths[row].append((part, token_begin, token_end))
    assert num_tiles == plan.num_tiles
    for row, path in enumerate(paths):
        path.sort()
        assert [part for part, _, _ in path] == list(range(len(path)))
        borders = [0, *(end for _, _, end in path)]
        assert [begin for _, begin, _ in path] == borders[:-1]
        assert borders[-1] >= (seq_lens[row] if q_len[row] else 0)
        assert plan.part_indptr[order[row] + 1] - plan.part_indptr[order[row]] == q_len[row] * len(path)
    # what a kernel that knows nothing but shapes reserves for partial results
    bound = 9 * sum(q_len) + min(sum(q_len) * 4 * workers, 512 * workers // group)
    assert plan.num_parts == plan.part_indptr[-1] <= bound


def test_a_flat_plan_gives_every_worker_something_to_do():
    page_table, seq_lens = as_tables([list(range(512))], 16, [16])
    plan = plan_of(page_table, seq_lens, num_qo_heads=32, num_kv_heads=8, num_workers=264)
    assert plan.num_tiles == 64  # of 128 tokens, for each of 8 kv heads
    rows = tree_rows([64], [128, 16])
    plan = plan_of(*as_tables(rows, 16, [16] * 64), num_qo_heads=32, num_kv_heads=8, num_workers=264)
    assert plan.unique_tokens == 16 * (128 + 64 * 16)
    assert 33 <= plan.num_tiles <= 5 * 33 + 64


TREES = [
    ((1, 64), (8192, 256)),
    ((16, 128), (4096, 512)),
    ((1, 8, 64, 512), (4096, 1024, 256, 64)),
    ((40,), (4096,)),
]


@pytest.mark.parametrize(("nodes", "tokens"), TREES, ids=str)
def test_a_flat_plan_spreads_evenly_and_leaves_few_partial_results(nodes, tokens):
    rows = tree_rows([b // a for a, b in pairwise(nodes)], [n // 16 for n in tokens])
    rows = [[nodes[0] * page + root for page in row] for root in range(nodes[0]) for row in rows]
    plan = plan_of(*as_tables(rows, 16, [16] * len(rows)), num_qo_heads=32, num_kv_heads=8, num_workers=264)
    costs = []  # of the work tiles, in their order
    for chunk in plan.named_chunks():
        num_tiles = -(-4 * (chunk.row_end - chunk.row_begin) // 128) * 8
        costs += [chunk.token_end - chunk.token_begin] * num_tiles
    loads = [0] * 264  # as tree_attention deals them out, in turns forwards and backwards
    for i, cost in enumerate(costs):
        turn, worker = divmod(i, 264)
        loads[263 - worker if turn % 2 else worker] += cost
    assert max(loads) <= 1.15 * sum(costs) / 264
    # Bytes that partial results are written with, in fp32, against those of all keys and values in 16 bits.
    parts = plan.num_parts.item() * 32 * 4
    assert parts <= 0.35 * plan.unique_tokens.item() * 8 * 2 * 2


@settings(max_examples=60, deadline=None)
@given(forests(max_rows=6, max_tokens=600), st.randoms())
@example((*as_tables([[1, 2], [1, 3]], 16, [16, 16]), None, 16), None)
def test_reads_nothing_beyond_seq_len(forest, rng):
    page_table, seq_lens, q_lens, page_size = forest
    unused = page_table == UNUSED
    plans = []
    for fill in (UNUSED, -1, 7):  # equal in all rows: the strongest temptation to share
        plans.append(plain(plan_of(page_table.masked_fill(unused, fill), seq_lens, q_lens, page_size)))
    wide = torch.full((len(page_table), page_table.shape[1] + 3), 5, dtype=torch.int32)
    wide[:, : page_table.shape[1]] = page_table
    plans.append(plain(plan_of(wide[:, : page_table.shape[1]], seq_lens, q_lens, page_size)))
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden(case):
    page_size = case["page_size"]
    page_table = torch.full((len(case["pages"]), case["max_pages"]), UNUSED, dtype=torch.int32)
    for table_row, row in zip(page_table, case["pages"], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor(case["seq_lens"], dtype=torch.int32)
    q_lens = None if case["q_lens"] is None else torch.tensor(case["q_lens"], dtype=torch.int32)
    args = page_table, seq_lens, q_lens, page_size, case["num_qo_heads"], case["num_kv_heads"]
    assert plain(plan_of(*args)) == golden_plan(case, case)
    for flat in case["flat"]:
        assert plain(plan_of(*args, flat["num_workers"])) == golden_plan(case, flat)


def test_each_shared_page_is_read_once():
    rows = tree_rows([4, 3], [20, 10, 5])
    page_table, seq_lens = as_tables(rows, 16, [16] * 12)
    plan = plan_of(page_table, seq_lens)
    assert plan.unique_tokens == 16 * (20 + 4 * 10 + 12 * 5)
    assert plan.path_tokens == 16 * 12 * 35


@settings(max_examples=200, deadline=None)
@given(forests(max_rows=12), st.sampled_from(HEADS), st.sampled_from([0, 264]), st.randoms(use_true_random=False))
def test_every_order_of_the_branches_shares_alike(forest, heads, num_workers, rng):
    page_table, seq_lens, q_lens, page_size = forest
    plan = plan_of(page_table, seq_lens, q_lens, page_size, *heads, num_workers)
    shuffled = rng.sample(range(len(seq_lens)), len(seq_lens))
    args = (page_table[shuffled], seq_lens[shuffled], None if q_lens is None else q_lens[shuffled])
    again = plan_of(*args, page_size, *heads, num_workers)
    assert again.unique_tokens == plan.unique_tokens
    assert again.path_tokens == plan.path_tokens
    if num_workers:  # the same rows, up to branches of equal pages
        assert page_table[shuffled][again.order].equal(page_table[plan.order])
        assert chunks_of(again) == chunks_of(plan) or len({tuple(row) for row in page_table.tolist()}) < len(seq_lens)


def test_interleaved_prompts_are_read_once():
    rows = [[*range(1000 * prompt, 1000 * prompt + 256), 9000 + branch] for branch in range(8) for prompt in range(4)]
    page_table, seq_lens = as_tables(rows, 16, [16] * 32)
    plan = plan_of(page_table, seq_lens)
    assert plan.unique_tokens == 16 * (4 * 256 + 32)
    assert plan.order.tolist() == [4 * branch + prompt for prompt in range(4) for branch in range(8)]


def test_a_chained_plan_keeps_an_order_that_loses_nothing():
    rows = tree_rows([3, 2], [4, 3, 2])
    for kept in (rows, rows[::-1], rows[2:4] + rows[:2] + rows[4:]):
        plan = plan_of(*as_tables(kept, 16, [16] * 6))
        assert plan.order.tolist() == list(range(6))
        assert plan_of(*as_tables(kept, 16, [16] * 6), num_workers=8).unique_tokens == plan.unique_tokens
    plan = plan_of(*as_tables([rows[i] for i in (0, 2, 1, 3, 4, 5)], 16, [16] * 6))
    assert plan.order.tolist() == [0, 2, 1, 3, 4, 5]


def test_equal_ids_at_other_positions_are_not_shared():
    plan = plan_of(*as_tables([[1, 2, 3] * 9, [9, 2, 3] * 9, [2, 3, 1] * 9], 16, [16] * 3))
    assert plan.unique_tokens == plan.path_tokens


def test_a_partial_last_page_is_shared_by_rows_of_different_lengths():
    rows = [list(range(40))] * 3
    plan = plan_of(*as_tables(rows, 16, [3, 9, 9]))
    assert all((chunk.row_begin, chunk.row_end) == (0, 3) for chunk in plan.named_chunks())
    assert plan.unique_tokens == 39 * 16 + 9


def test_a_row_may_be_the_beginning_of_another():
    rows = [list(range(n)) for n in (40, 60, 50)]
    plan = plan_of(*as_tables(rows, 16, [16] * 3))
    assert plan.unique_tokens == 16 * 60


@pytest.mark.parametrize(("shared_pages", "is_folded"), [(1, True), (2, True), (3, False)])
def test_folds_a_node_that_does_not_pay(shared_pages, is_folded):
    # 16 * (2 - 1) * n tokens read again, against 32 * 2 rows * group of 8: the border is at 32 tokens
    page_table, seq_lens = as_tables(tree_rows([2], [shared_pages, 4]), 16, [16, 16])
    plan = plan_of(page_table, seq_lens, num_qo_heads=8, num_kv_heads=1)
    first = plan.named_chunks()[0]
    assert (first.row_end - first.row_begin == 1) == is_folded
    assert plan.unique_tokens == 16 * (8 + shared_pages * (1 + is_folded))


def test_does_not_fold_rows_that_end_there():
    plan = plan_of(*as_tables([[1], [1]], 16, [3, 5]), num_qo_heads=8, num_kv_heads=1)
    assert chunks_of(plan) == [[0, 2, 0, 5, 0, 0]]


def test_an_odd_number_of_tokens_is_not_shared():
    plan = plan_of(*as_tables([[*range(101), 200, 201], [*range(101), 300]], 1, [1, 1]), page_size=1)
    assert chunks_of(plan) == [[0, 2, 0, 100, 0, 0], [0, 1, 100, 103, 0, 1], [1, 2, 100, 102, 0, 1]]


def test_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    page_table = torch.randint(0, 2, (700, 2000), dtype=torch.int32)
    page_table[:, :900] = torch.arange(900)
    page_table[100:200, :1500] = torch.arange(1500)
    seq_lens = torch.randint(0, 2001, (700,), dtype=torch.int32)
    before = torch.get_num_threads()
    plans = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        plans.append(plain(plan_of(page_table, seq_lens, page_size=1)))
    torch.set_num_threads(before)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("num_workers", [0, 264])
@pytest.mark.parametrize("q_lens", [None, torch.tensor([3, 0, 1], dtype=torch.int32)])
def test_opcheck(q_lens, num_workers):
    page_table, seq_lens = as_tables([[1, 2, 3], [1, 2, 4], [1]], 16, [5, 6, 7])
    torch.library.opcheck(torch.ops.treedecode.plan_tree, (page_table, seq_lens, q_lens, 16, 8, 2, 64, num_workers))


@pytest.mark.parametrize(("num_rows", "max_pages"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_plan(num_rows, max_pages):
    plan = plan_of(torch.empty(num_rows, max_pages, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int32))
    queries = list(range(num_rows + 1))
    assert plain(plan) == [queries, [0] * (num_rows + 1), [], [0, 0, 0, 0, 16, 0], queries[:-1], queries]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"page_table": torch.zeros(2, 4)}, TypeError, "page_table: expected dtype int32, got float32"),
        ({"page_table": int32(1, 2)}, ValueError, r"page_table: expected shape \[num_branches, max_pages\]"),
        ({"page_table": torch.zeros(4, 2, dtype=torch.int32).t()}, ValueError, "page_table: expected unit stride"),
        ({"seq_lens": int32(1, 2, 3)}, ValueError, r"seq_lens: expected shape \[num_branches\] = \[2\], got \[3\]"),
        ({"seq_lens": torch.tensor([1, 2])}, TypeError, "seq_lens: expected dtype int32, got int64"),
        ({"seq_lens": int32(1, 0, 2, 0)[::2]}, ValueError, "seq_lens: expected a contiguous tensor"),
        ({"seq_lens": int32(1, 65)}, ValueError, "seq_lens: expected values .* = 64, got 65 at index 1"),
        ({"seq_lens": int32(-1, 5)}, ValueError, "seq_lens: expected values .* got -1 at index 0"),
        ({"q_lens": int32(1)}, ValueError, r"q_lens: expected shape \[num_branches\] = \[2\], got \[1\]"),
        ({"q_lens": int32(1, -1)}, ValueError, "q_lens: expected values from 0 .* got -1 at index 1"),
        (
            {"q_lens": int32(6, 1)},
            ValueError,
            "q_lens: expected values from 0 to the branch's seq_len 5, got 6 at index 0",
        ),
        ({"page_size": 0}, ValueError, "page_size: expected a positive number, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected a positive number, got 0"),
        ({"num_qo_heads": 3}, ValueError, "num_qo_heads: expected a multiple of num_kv_heads, got 3"),
        ({"num_workers": -1}, ValueError, "num_workers: expected 0 .* or more, got -1"),
        ({"head_dim": 0}, ValueError, "head_dim: expected a multiple of 8 up to 256, got 0"),
        ({"head_dim": 12}, ValueError, "head_dim: expected a multiple of 8 up to 256, got 12"),
        ({"head_dim": 264}, ValueError, "head_dim: expected a multiple of 8 up to 256, got 264"),
    ],
)
def test_bad_arguments(change, error, message):
    args = {
        "page_table": torch.zeros(2, 4, dtype=torch.int32),
        "seq_lens": int32(5, 20),
        "q_lens": None,
        "page_size": 16,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
    } | change
    with pytest.raises(error, match=message):
        ops.plan_tree(**args)


def test_counts_that_do_not_fit_are_an_error():
    page_table = torch.zeros(3, 1 << 20, dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_lens: the branches' tokens, queries or partial results add up to more"):
        plan_of(page_table, torch.full((3,), 1 << 30, dtype=torch.int32), page_size=1 << 10)


@pytest.mark.parametrize("num_workers", [0, 8])
def test_repr_shows_only_defined_numbers(num_workers):
    page_table, seq_lens = as_tables([[1, 2, 3], [1, 2, 4]], 16, [5, 6])
    plan = plan_of(page_table, seq_lens, num_workers=num_workers)
    last = 123456789
    plan.chunks[plan.num_chunks - 1, ROW_END] = last
    plan.chunks[plan.num_chunks :] = 987654321  # as memory that nothing has written may hold
    text = repr(plan)
    assert text.startswith(f"TreePlan(num_chunks={plan.num_chunks}, num_parts=")
    assert f"page_size=16, num_tiles={plan.num_tiles}, q_indptr=tensor([0, 1, 2]" in text
    assert str(last) in text
    assert "987654321" not in text
    plan.num_chunks.fill_(-1)  # as on a GPU, where a count does not fit
    assert str(last) not in repr(plan)
    meta = ops.TreePlan(*(tensor.to("meta") for tensor in plan.tensors))
    assert repr(meta) == f"TreePlan(num_branches=2, max_chunks={len(plan.chunks)})"
