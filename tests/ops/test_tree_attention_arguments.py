"""Bad arguments of tree_attention, and plans of another batch."""

import dataclasses

import pytest
import torch
from support.attention_cases import make_case
from support.forests import as_tables
from support.tensors import int32

from treedecode import ops
from treedecode.reference.plan_tree import ChainedChunk, PlanCounts

TWO_ROWS = int32(1, 2, 3, 1, 2, 4).view(2, 3), int32(40, 37)
TOKEN_BEGIN, TOKEN_END, ROUND = (ChainedChunk._fields.index(name) for name in ("token_begin", "token_end", "round"))
NUM_CHUNKS = PlanCounts._fields.index("num_chunks")
SIZES = {"page_size": 16, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 32}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4)}, ValueError, r"q: expected shape \[num_q, num_qo_heads, head_dim\]"),
        (
            {"q": torch.zeros(2, 4, 32).double()},
            TypeError,
            "q: expected dtype float32, bfloat16 or float16, got float64",
        ),
        ({"q": torch.zeros(2, 3, 32)}, ValueError, "q: expected num_qo_heads a positive multiple of .* = 2, got 3"),
        ({"q": torch.zeros(2, 0, 32)}, ValueError, "q: expected num_qo_heads a positive multiple .* got 0"),
        ({"q": torch.zeros(1, 4, 32)}, ValueError, "plan: expected q_indptr from 0 to at most the .* query tokens 1"),
        ({"q": torch.zeros(2, 4, 30)}, ValueError, "q: expected head_dim a multiple of 8 up to 256, got 30"),
        ({"q": torch.zeros(2, 4, 264)}, ValueError, "q: expected head_dim a multiple of 8 up to 256, got 264"),
        ({"k_pages": torch.zeros(9, 16, 2, 24)}, ValueError, "k_pages: expected shape"),
        ({"k_pages": torch.zeros(9, 16, 2, 32).half()}, TypeError, "k_pages: expected dtype float32, got float16"),
        ({"k_pages": torch.zeros(9, 16, 32, 2).mT}, ValueError, "k_pages: expected unit stride in the last dimension"),
        ({"v_pages": torch.zeros(9, 8, 2, 32)}, ValueError, "v_pages: expected shape the shape of k_pages"),
        ({"page_table": torch.zeros(2, 3)}, TypeError, "page_table: expected dtype int32, got float32"),
        (
            {"page_table": int32(1, 2, 9, 1, 2, 4).view(2, 3)},
            ValueError,
            r"page_table: expected page ids below 9, got 9",
        ),
        ({"page_table": int32(1, -3, 3, 1, -3, 4).view(2, 3)}, ValueError, r"page_table: .* got -3"),
        ({"page_table": int32(1, 2, 3, 1, 5, 4).view(2, 3)}, ValueError, "plan: was made for another page_table"),
        ({"seq_lens": int32(40, 38)}, ValueError, "plan: was made for seq_lens .* add up to 77 tokens, got 78"),
        (
            {"k_pages": torch.zeros(9, 32, 2, 32), "v_pages": torch.zeros(9, 32, 2, 32)},
            ValueError,
            "plan: was made for pages of 16 tokens, got 32",
        ),
        (
            {"out": torch.zeros(3, 4, 32)},
            ValueError,
            r"out: expected shape the shape of q = \[2, 4, 32\], got \[3, 4, 32\]",
        ),
        ({"out": torch.zeros(2, 4, 32).half()}, TypeError, "out: expected dtype float32, got float16"),
        ({"out": torch.zeros(2, 32, 4).mT}, ValueError, "out: expected a contiguous tensor"),
        (
            {"lse": torch.zeros(2, 3)},
            ValueError,
            r"lse: expected shape \[num_q, num_qo_heads\] = \[2, 4\], got \[2, 3\]",
        ),
        ({"lse": torch.zeros(2, 4).double()}, TypeError, "lse: expected dtype float32, got float64"),
        ({"lse": torch.zeros(4, 2).t()}, ValueError, "lse: expected a contiguous tensor"),
        ({"window_left": -2}, ValueError, "window_left: expected -1 .* or more, got -2"),
        ({"sm_scale": 1e-46}, ValueError, "sm_scale: expected a positive number of the range of fp32"),
        ({"logits_soft_cap": 1e39}, ValueError, "logits_soft_cap: expected 0 .* got 1e"),
        ({"sinks": torch.tensor([0, 0, torch.inf, 0])}, ValueError, "sinks: expected numbers below .*inf"),
        ({"seq_lens": int32(33)}, ValueError, r"seq_lens: expected shape \[num_branches\] = \[2\], got \[1\]"),
        ({"sm_scale": float("nan")}, ValueError, "sm_scale: expected a positive number"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap: expected 0 .* got -1"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \[num_qo_heads\] = \[4\], got \[3\]"),
        ({"sinks": torch.zeros(4).half()}, TypeError, "sinks: expected dtype float32, got float16"),
        (
            {"plan": ops.plan_tree(*TWO_ROWS, **SIZES, num_workers=8)},
            ValueError,
            r"plan: is flat, for a GPU; plan_tree\(..., num_workers=0\) makes one for the CPU",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    page_table, seq_lens = TWO_ROWS
    args = {
        "q": torch.zeros(2, 4, 32),
        "k_pages": torch.zeros(9, 16, 2, 32),
        "v_pages": torch.zeros(9, 16, 2, 32),
        "page_table": page_table,
        "seq_lens": seq_lens,
        "plan": ops.plan_tree(page_table, seq_lens, **SIZES),
    } | change
    with pytest.raises(error, match=message):
        ops.tree_attention(**args)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("chunks", {(0, TOKEN_END): 30}, "plan: chunk 1 does not go on where the one before of row 0 ends"),
        ("chunks", {(1, TOKEN_END): 33}, "plan: its chunks end at token 33 of row 0, which has 40"),
        ("chunks", {(1, TOKEN_BEGIN): 33}, "plan: chunk 1 does not go on"),
        ("chunks", {(1, ROUND): 2, (2, ROUND): 2}, "plan: chunk 1 does not go on"),  # of a round that does not exist
        ("counts", {NUM_CHUNKS: 2}, "plan: its chunks end at token 32 of row 1, which has 37"),
        ("counts", {NUM_CHUNKS: 0}, "plan: its chunks end at token 0 of row 0, which has 40"),
        ("part_indptr", {1: 2}, "plan: expected 1 parts per query token of row 0, got 2 for 1"),
        ("order", {1: 0}, "plan: expected every branch once in order, got 0 at index 1"),
        ("order", {0: -1}, "plan: expected every branch once in order, got -1 at index 0"),
        ("order", {1: 2}, "plan: expected every branch once in order, got 2 at index 1"),
        ("row_indptr", {0: 1}, "plan: expected row_indptr from 0, got 1"),
        ("row_indptr", {1: 2}, "plan: q_indptr and row_indptr differ in the query tokens of branch 0"),
        ("seq_lens", {0: -3, 1: 80}, "seq_lens: expected 0 to 48, got -3"),
        ("seq_lens", {0: 77, 1: 0}, "seq_lens: expected 0 to 48, got 77"),
    ],
)
def test_plans_that_leave_keys_out(field, change, message):
    page_table, seq_lens = TWO_ROWS
    plan = ops.plan_tree(page_table, seq_lens, **SIZES)
    assert (plan.num_chunks, plan.num_parts) == (3, 2)
    values = (seq_lens if field == "seq_lens" else getattr(plan, field)).clone()
    for at, value in change.items():
        values[at] = value
    if field == "seq_lens":
        seq_lens = values
    else:
        plan = dataclasses.replace(plan, **{field: values})
    pages = torch.zeros(9, 16, 2, 32)
    with pytest.raises(ValueError, match=message):
        ops.tree_attention(torch.zeros(2, 4, 32), pages, pages, page_table, seq_lens, plan)


def test_the_last_round_may_have_any_number():
    """A chunk of rows without queries is not computed, and its round may be any number."""
    page_table, seq_lens = torch.cat([TWO_ROWS[0], int32(5, 6, 7)[None]]), torch.cat([TWO_ROWS[1], int32(48)])
    plan = ops.plan_tree(page_table, seq_lens, int32(1, 1, 0), **SIZES)
    assert (plan.num_chunks, plan.num_parts) == (3, 2)
    assert len(plan.chunks) > 3
    generator = torch.Generator().manual_seed(0)
    q, pages = torch.randn(2, 4, 32, generator=generator), torch.randn(9, 16, 2, 32, generator=generator)
    want = ops.tree_attention(q, pages, pages, page_table, seq_lens, plan)
    plan.chunks[3] = int32(*ChainedChunk(2, 3, 0, 48, segment=0, round=2**31 - 1))
    plan.num_chunks.fill_(4)
    assert all(map(torch.equal, ops.tree_attention(q, pages, pages, page_table, seq_lens, plan), want))


def test_a_plan_is_checked_once_on_request():
    """Without the check a table that shares other pages is taken as it is."""
    case = make_case(as_tables([[1, 2, 3], [1, 2, 4]], 16, [16, 16]))
    other = case.page_table.clone()
    other[1, :2] = case.page_table[1, 2]
    args = (*case.args[:3], other, *case.args[4:])
    with pytest.raises(ValueError, match="plan: was made for another page_table"):
        ops.tree_attention(*args)
    out, _ = ops.tree_attention(*args, checks_plan=False)
    assert out.equal(case.run()[0])  # the pages of the rows that the plan names
