"""Golden plans, head counts and page tables for the tests of plan_tree, and plans as plain numbers."""

import json

from support import paths
from support.forests import as_tables

from treedecode import ops

HEADS = [(9, 3), (14, 2), (32, 8), (8, 1), (4, 4)]
LONG_PREFILLS = as_tables([list(range(64 * row, 64 * row + 64)) for row in range(70)], 64, [64] * 70)
GOLDEN = json.loads((paths.GOLDEN / "plan_tree.json").read_text())


def plan_of(page_table, seq_lens, q_lens=None, page_size=16, num_qo_heads=4, num_kv_heads=4, num_workers=0):
    """Makes a plan by `ops.plan_tree`, with defaults for arguments that most tests do not vary."""
    return ops.plan_tree(
        page_table,
        seq_lens,
        q_lens,
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        num_workers=num_workers,
    )


def chunks_of(plan):
    """Returns the defined rows of `plan.chunks`."""
    return plan.chunks[: plan.num_chunks].tolist()


def golden_plan(case, plan):
    """Returns a plan of a golden case (the case's own, or one of case["flat"]) as `plain` does."""
    names = ("part_indptr", "chunks", "counts", "order", "row_indptr")
    return [case["q_indptr"], *(plan[name] for name in names)]


def plain(plan):
    """Returns the defined numbers of the plan, as lists."""
    rows = [plan.order.tolist(), plan.row_indptr.tolist()]
    return [plan.q_indptr.tolist(), plan.part_indptr.tolist(), chunks_of(plan), plan.counts.tolist(), *rows]
