"""Memory traffic of the tensor core kernel, counted on the host: each key once, whole sectors, no bank conflicts."""

import pytest
import torch
from support import simt_kernels as simt
from support.attention_cases import make_case, ragged
from support.attention_kernels import attend, flat_plan
from support.forests import tree_rows


def counted(case, num_workers):
    plan = flat_plan(case, num_workers)
    return plan, simt.traffic(lambda: attend(case, plan=plan))


def num_queries(plan, chunk):
    return int(plan.row_indptr[chunk.row_end] - plan.row_indptr[chunk.row_begin])


def query_bytes(plan, num_qo_heads, head_dim):
    """Returns the bytes of queries, which are read once for each chunk on their path."""
    return sum(num_queries(plan, chunk) for chunk in plan.named_chunks()) * num_qo_heads * head_dim * 2


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("num_branches", [4, 20, 40, 100])  # all ways in which warps share a tile
def test_shared_memory_has_no_bank_conflicts(num_branches, head_dim):
    rows = ragged(tree_rows([num_branches], [9, 1]), 16)
    case = make_case(rows, num_qo_heads=1, num_kv_heads=1, head_dim=head_dim, dtype=torch.bfloat16)
    _, counts = counted(case, 1)
    assert counts["matrices"] > 0
    assert counts["matrix_passes"] == counts["matrices"]
    assert counts["copy_passes"] == counts["copies"] > 0
    assert counts["sectors"] * 32 == counts["bytes"]


@pytest.mark.parametrize(
    ("fan_out", "pages", "num_workers"),
    [([16], [12, 1], 8), ([2, 3, 2], [9, 3, 2, 1], 12), ([1], [30], 16)],
    ids=["wide", "deep", "alone"],
)
def test_each_shared_page_is_read_once_for_each_kv_head(fan_out, pages, num_workers):
    """The packed rows of a kv head in a node fit one tile here; otherwise a page is read once for each tile."""
    heads, head_dim = (8, 2), 128
    case = make_case(
        ragged(tree_rows(fan_out, pages), 16), num_qo_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
        dtype=torch.bfloat16,
    )  # fmt: skip
    plan, counts = counted(case, num_workers)
    keys_and_values = plan.unique_tokens.item() * heads[1] * head_dim * 2 * 2
    assert counts["bytes"] == keys_and_values + query_bytes(plan, heads[0], head_dim)


def test_a_page_is_read_once_for_128_packed_rows():
    case = make_case(
        ragged(tree_rows([70], [20, 1]), 16), num_qo_heads=4, num_kv_heads=1, head_dim=64, dtype=torch.bfloat16
    )
    plan, counts = counted(case, 4)
    chunks = plan.named_chunks()
    tiles = [-(-num_queries(plan, chunk) * 4 // 128) for chunk in chunks]
    assert max(tiles) == 3
    tokens = sum((chunk.token_end - chunk.token_begin) * n for chunk, n in zip(chunks, tiles, strict=True))
    assert counts["bytes"] == tokens * 64 * 2 * 2 + query_bytes(plan, 4, 64)
