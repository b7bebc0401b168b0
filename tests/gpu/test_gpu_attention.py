"""plan_tree and tree_attention on CUDA tensors, by every backend, with the CPU tests' forests and error budgets."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention_cases import assert_within_budget, make_case, ragged, two_trees_and_loners
from support.forests import UNUSED, as_tables, forests, tree_rows
from support.gpu_cases import DEVICE, GPU, to_cpu, to_gpu
from support.plan_cases import GOLDEN, HEADS, LONG_PREFILLS, plain, plan_of

from treedecode import ops, reference
from treedecode.models import prefill

pytestmark = GPU
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [  # num_qo_heads, num_kv_heads, head_dim, page_size; each shape and dtype is compiled anew
    (9, 3, 64, 16, DTYPES),
    (32, 8, 128, 16, DTYPES),
    (32, 8, 128, 64, DTYPES[:1]),
    (8, 1, 96, 32, DTYPES[:1]),
    (4, 4, 16, 1, DTYPES[1:2]),
    (4, 2, 24, 64, DTYPES[2:]),
    (3, 1, 80, 8, DTYPES[:1]),
    (2, 2, 256, 16, DTYPES[:1]),
]
FEW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


# -- plan_tree --


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_plans(through, case):
    through("plan_tree")
    page_table = torch.full((len(case["pages"]), case["max_pages"]), UNUSED, dtype=torch.int32)
    for table_row, row in zip(page_table, case["pages"], strict=True):
        table_row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    seq_lens = torch.tensor(case["seq_lens"], dtype=torch.int32, device=DEVICE)
    q_lens = None if case["q_lens"] is None else torch.tensor(case["q_lens"], dtype=torch.int32, device=DEVICE)
    args = page_table.to(DEVICE), seq_lens, q_lens, case["page_size"], case["num_qo_heads"], case["num_kv_heads"]
    for flat in case["flat"]:
        plan = plan_of(*args, flat["num_workers"])
        assert plan.chunks.device.type == DEVICE.type
        assert plain(plan) == [case["q_indptr"], flat["part_indptr"], flat["chunks"], flat["counts"]]


@settings(max_examples=60, **FEW)
@given(forests(), st.sampled_from(HEADS), st.sampled_from([1, 30, 264]))
def test_plans_are_the_references(through, forest, heads, num_workers):
    through("plan_tree")
    page_table, seq_lens, q_lens, page_size = forest
    got = plan_of(page_table.to(DEVICE), seq_lens.to(DEVICE), to_gpu(q_lens), page_size, *heads, num_workers)
    want = reference.plan_tree(page_table, seq_lens, q_lens, page_size, *heads, 64, num_workers)
    assert plain(got) == [t.tolist() for t in want]


def test_plans_of_many_rows(through):
    through("plan_tree")
    wide = as_tables(tree_rows([4, 4, 4, 4, 4], [3, 1, 2, 1, 1, 2]), 16, [5] * 1024)
    for page_table, seq_lens, page_size in ((*wide, 16), (*LONG_PREFILLS, 64)):
        for num_workers in (7, 264):
            options = {"page_size": page_size, "num_workers": num_workers, "num_qo_heads": 8}
            got = plan_of(page_table.to(DEVICE), seq_lens.to(DEVICE), **options)
            assert plain(got) == plain(plan_of(page_table, seq_lens, **options))


def test_a_chained_plan_is_for_the_cpu():
    page_table, seq_lens = as_tables([[1, 2]], 16, [5])
    with pytest.raises(ValueError, match="num_workers"):
        plan_of(page_table.to(DEVICE), seq_lens.to(DEVICE), num_workers=0)


# -- tree_attention --


def on_gpu(case, num_workers=None):
    """Returns out and lse of the GPU's ops, on the CPU, after a check that a second call gives the same bits."""
    q, k_pages, v_pages, page_table, seq_lens = map(to_gpu, case.args[:5])
    q_lens = case.plan.q_indptr.diff()
    plan = ops.plan_tree(
        page_table,
        seq_lens,
        None if bool((q_lens == 1).all()) else q_lens.to(DEVICE),
        page_size=k_pages.shape[1],
        num_qo_heads=q.shape[1],
        num_kv_heads=k_pages.shape[2],
        head_dim=q.shape[2],
        num_workers=num_workers,
    )
    options = dict(case.options)
    options["sinks"] = to_gpu(options.get("sinks"))
    first, second = (
        to_cpu(ops.tree_attention(q, k_pages, v_pages, page_table, seq_lens, plan, **options)) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    return first


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, dtype) for *shape, dtypes in SHAPES for dtype in dtypes],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_decode_steps(through, shape, dtype):
    through("tree_attention")
    num_qo_heads, num_kv_heads, head_dim, page_size = shape
    case = make_case(
        two_trees_and_loners(page_size),
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    for num_workers in (None, 1, 5):
        assert_within_budget(case, on_gpu(case, num_workers))


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 0},
        {"window_left": 40},
        {"logits_soft_cap": 2.5},
        {"sinks": torch.tensor([0.5, -3.0, 6.0, -torch.inf])},
        {"sm_scale": 0.7, "window_left": 33, "logits_soft_cap": 30.0, "sinks": torch.tensor([1.0, 2.0, 3.0, 4.0])},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(through, dtype, options):
    through("tree_attention")
    forest = two_trees_and_loners(16)
    q_lens = [n if i == 1 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    for lens in (None, q_lens):
        case = make_case(forest, lens, dtype=dtype, **options)
        assert_within_budget(case, on_gpu(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_beside_decode(through, dtype):
    through("tree_attention")
    long = list(range(22))
    rows = [long, [50, 51, 52], [50, 51, 53, 54], long[:6], [], [70]]
    forest = as_tables(rows, 16, [3, 16, 1, 16, 0, 9])
    for q_lens in ([339, 1, 1, 1, 0, 9], [300, 0, 7, 90, 0, 0], [1, 48, 49, 0, 0, 1]):
        case = make_case(forest, q_lens, num_qo_heads=6, dtype=dtype)
        assert_within_budget(case, on_gpu(case))


@settings(max_examples=40, **FEW)
@given(forests(max_rows=8, max_tokens=700, page_sizes=(8,)), st.sampled_from([-1, 50]))
def test_any_forest(through, forest, window_left):
    """Forests have one page size and number of heads, because Triton compiles the kernel for each."""
    through("tree_attention")
    page_table, seq_lens, q_lens, page_size = forest
    case = make_case(
        (page_table, seq_lens),
        None if q_lens is None else q_lens.clamp(max=20),
        page_size=page_size,
        num_qo_heads=7,
        num_kv_heads=1,
        head_dim=32,
        dtype=torch.bfloat16,
        window_left=window_left,
    )
    assert_within_budget(case, on_gpu(case))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_branches_on_a_long_prefix(through, dtype):
    through("tree_attention")
    case = make_case(ragged(tree_rows([70], [70, 1]), 16), num_qo_heads=8, num_kv_heads=1, head_dim=16, dtype=dtype)
    for num_workers in (None, 3):
        assert_within_budget(case, on_gpu(case, num_workers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_and_equal_rows(through, dtype):
    through("tree_attention")
    case = make_case(two_trees_and_loners(16), dtype=dtype, spread=40.0)
    assert_within_budget(case, on_gpu(case))
    pages = list(range(20))
    case = make_case(as_tables([pages[:9], pages, pages, pages, pages], 16, [5, 3, 16, 3, 1]), dtype=dtype)
    assert_within_budget(case, on_gpu(case))


def test_layout_does_not_matter(through):
    through("tree_attention")
    forest = two_trees_and_loners(16)
    nhd, hnd = (on_gpu(make_case(forest, dtype=torch.bfloat16, layout=layout)) for layout in ("NHD", "HND"))
    assert all(map(torch.equal, nhd, hnd))


def test_without_keys(through):
    through("tree_attention")
    forest = as_tables([[], [1], []], 16, [0, 3, 0])
    for options in ({}, {"sinks": torch.tensor([1.0, -2.0, 0.0, 9.0])}):
        case = make_case(forest, [2, 1, 1], **options)
        out, lse = on_gpu(case)
        assert not out[[0, 1, 3]].any()
        assert_within_budget(case, (out, lse))
    nothing = make_case(as_tables([[], []], 16, [0, 0]), [0, 0])
    assert [x.shape[0] for x in on_gpu(nothing)] == [0, 0]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures a graph")
def test_a_captured_step_follows_its_inputs(through):
    """A captured plan and attention are replayed on other lengths and another tree."""
    through("plan_tree", "tree_attention")
    shape = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    rows = tree_rows([2, 3], [9, 4, 3])
    cases = [
        make_case(as_tables(rows, 16, last, 20), **shape)
        for last, rows in (([16] * 6, rows), ([1, 5, 9, 2, 16, 3], [rows[i] for i in (4, 0, 5, 1, 3, 2)]))
    ]
    cases.append(
        make_case(as_tables([*rows[:2], [], rows[3][:5], [], []], 16, [7] * 6, 20), [1, 1, 0, 1, 0, 0], **shape)
    )
    num_pages = max(case.k_pages.shape[0] for case in cases)
    kv = torch.zeros(2, num_pages, *cases[0].k_pages.shape[1:], dtype=torch.bfloat16, device=DEVICE)
    q = torch.zeros(6, 8, 64, dtype=torch.bfloat16, device=DEVICE)
    page_table, seq_lens, q_lens = (x.to(DEVICE) for x in (*cases[0].args[3:5], torch.ones(6, dtype=torch.int32)))

    def load(case):
        kv[0, : len(case.k_pages)], kv[1, : len(case.v_pages)] = case.k_pages.to(DEVICE), case.v_pages.to(DEVICE)
        q[: len(case.q)] = case.q.to(DEVICE)
        page_table.copy_(case.page_table)
        seq_lens.copy_(case.seq_lens)
        q_lens.copy_(case.plan.q_indptr.diff())

    def step():
        plan = ops.plan_tree(
            page_table, seq_lens, q_lens, page_size=16, num_qo_heads=8, num_kv_heads=2, head_dim=64, num_workers=20
        )
        return ops.tree_attention(q, *kv, page_table, seq_lens, plan)

    load(cases[0])
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for case in (*cases, cases[0]):
        load(case)
        graph.replay()
        num_q = len(case.q)
        assert_within_budget(case, to_cpu(x[:num_q] for x in result))


# -- prefill --


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("q_len", "seq_len"), [(300, 300), (257, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_prefill(dtype, q_len, seq_len, window):
    """torch or flash-attn, whichever is taken, gives the reference's result; queries are the last of the sequence."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(q_len, 8, 64, generator=generator).to(dtype)
    k, v = torch.randn(2, seq_len, 2, 64, generator=generator).to(dtype)
    got = prefill.attend(*(x.to(DEVICE) for x in (q, k, v)), scale=0.2, sliding_window=window, softcap=None)
    key, position = torch.arange(seq_len), torch.arange(seq_len - q_len, seq_len)[:, None]
    seen = (key <= position) & (key > position - (window or seq_len))
    k, v = (x.double().transpose(0, 1).repeat_interleave(4, 0) for x in (k, v))
    score = q.double().transpose(0, 1) @ k.mT * 0.2
    want = (score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    # weights and result are rounded once each
    assert (got.cpu().double() - want).norm() <= (2 * torch.finfo(dtype).eps + 2e-6) * want.norm()
