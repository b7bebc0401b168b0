"""tree_attention's and plan_tree's Triton kernels, run in the interpreter on flat plans."""

import dataclasses
import functools

import pytest
import torch
from attention_cases import assert_within_budget, make_case, ragged
from forests import as_tables, tree_rows

from treedecode import ops, triton_kernels
from treedecode.ops import _native

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

DTYPES = [torch.float32, torch.float16]  # bf16 is wrong in the interpreter, see test_triton_kernels.py
SHAPES = [  # num_qo_heads, num_kv_heads, head_dim, page_size
    (6, 2, 64, 16),
    (7, 1, 80, 1),
    (2, 2, 128, 64),
    (2, 1, 256, 32),
    (3, 1, 8, 24),
    (3, 1, 96, 128),
]


def flat(case, num_workers, q_lens=None):
    """The case with a flat plan."""
    page_size, num_kv_heads, head_dim = case.k_pages.shape[1:]
    q_lens = case.plan.q_indptr.diff() if q_lens is None else q_lens
    sizes = {"page_size": page_size, "num_qo_heads": case.q.shape[1], "num_kv_heads": num_kv_heads}
    plan = ops.plan_tree(
        case.page_table, case.seq_lens, q_lens, **sizes, head_dim=head_dim, num_workers=num_workers
    )
    return dataclasses.replace(case, plan=plan)


def launch(case):
    """What `ops.tree_attention` passes on for CUDA tensors."""
    options = {"sm_scale": None, "window_left": -1, "logits_soft_cap": 0.0, "sinks": None} | case.options
    if options["sm_scale"] is None:
        options["sm_scale"] = case.q.shape[-1] ** -0.5
    plan = case.plan
    args = (plan.q_indptr, plan.part_indptr, plan.chunks, plan.counts)
    return triton_kernels.launcher("tree_attention")(*case.args[:5], *args, *options.values())


def num_parts(case):
    """Of each query token, sorted."""
    parts, queries = case.plan.part_indptr.diff(), case.plan.q_indptr.diff()
    return {int(p) // int(q) for p, q in zip(parts, queries, strict=True) if q}


def three_levels(page_size):
    """Two trees, of three and two levels, single rows, a row that ends where others go on, an empty row."""
    unit = max(1, 32 // page_size)
    deep = tree_rows([2, 2], [5 * unit, 2 * unit, unit])
    wide = [[1000 + page for page in row] for row in tree_rows([3], [3 * unit, 1])]
    stub = deep[-1][: 2 * unit]
    return ragged([*deep, stub, wide[0], [5000], *wide[1:], []], page_size)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype, shape):
    num_qo_heads, num_kv_heads, head_dim, page_size = shape
    sizes = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    case = flat(make_case(three_levels(page_size), page_size=page_size, dtype=dtype, **sizes), 8)
    assert num_parts(case) >= {0, 1, 2}
    assert_within_budget(case, launch(case))


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
def test_options(dtype, options):
    forest = three_levels(16)
    q_lens = [n if i == 1 else min(n, i % 4) for i, n in enumerate(forest[1].tolist())]
    for lens in (None, q_lens):
        case = flat(make_case(forest, lens, dtype=dtype, **options), 4)
        assert len(num_parts(case)) > 1
        assert_within_budget(case, launch(case))
