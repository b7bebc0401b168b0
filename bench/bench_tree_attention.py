"""Times tree_attention beside scaled_dot_product_attention on copied caches and beside a cascade of two calls."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench import harness
from treedecode import ops

NUM_LAYERS = 32  # a plan is made once per step and used by this many layers
MAX_COPY_BYTES = 1200 << 20  # larger copied caches are not built


@dataclass(frozen=True)
class Tree:
    """A tree with `nodes[i]` nodes of `tokens[i]` tokens on level i; the last level's nodes are the branches."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    interleaved: bool = False  # the branches of the first level's nodes come in turns


TREES = {
    "64x(2048+64)": Tree((1, 64), (2048, 64)),
    "1,8,64 / 2048,256,32": Tree((1, 8, 64), (2048, 256, 32)),
    "16x2048 unshared": Tree((16,), (2048,)),
    "16x(512+32) 9/3 d64": Tree((1, 16), (512, 32), 9, 3, 64),
    "64x(512+32) 9/3 d64": Tree((1, 64), (512, 32), 9, 3, 64),
    "1,10 / 4000,400": Tree((1, 10), (4000, 400)),
    "1,8 / 4000,32 8/1": Tree((1, 8), (4000, 32), 8, 1),
    "1,128 / 128,32": Tree((1, 128), (128, 32)),
    "1,64 / 8192,256": Tree((1, 64), (8192, 256)),
    "1,16,64 / 1024,256,32": Tree((1, 16, 64), (1024, 256, 32)),
    "1,4,16,512 / 1024,256,128,32": Tree((1, 4, 16, 512), (1024, 256, 128, 32)),
    "4,32 / 4096,16 9/3 d64": Tree((4, 32), (4096, 16), 9, 3, 64),
    "4,32 / 4096,16 9/3 d64, in turns": Tree((4, 32), (4096, 16), 9, 3, 64, interleaved=True),
}


def make_cache(tree: Tree, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Makes random K and V `[2, num_pages, num_kv_heads, page_size, head_dim]` and the branches' page table."""
    columns, num_pages = [], 0
    for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
        per_node = math.ceil(tokens / tree.page_size)
        ids = torch.arange(num_pages, num_pages + nodes * per_node, dtype=torch.int32).view(nodes, per_node)
        columns.append(ids.repeat_interleave(tree.nodes[-1] // nodes, 0))
        num_pages += nodes * per_node
    kv = torch.randn(2, num_pages, tree.num_kv_heads, tree.page_size, tree.head_dim).to(dtype)
    page_table = torch.cat(columns, 1)
    if tree.interleaved:
        page_table = page_table.unflatten(0, (tree.nodes[0], -1)).transpose(0, 1).flatten(0, 1).contiguous()
    return kv, page_table


def dense(kv: Tensor, pages: Tensor) -> Tensor:
    """Copies the pages of each row to a dense cache: `[2, num_rows, num_kv_heads, len, head_dim]`."""
    return kv[:, pages.long()].transpose(2, 3).flatten(3, 4).contiguous()


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Runs torch's flash attention for the CPU; lse is the natural log, fp32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


def matmul_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    lse = score.logsumexp(-1)
    return score.sub_(lse[..., None]).exp_().to(q.dtype) @ v, lse


def two_calls(attention, q: Tensor, prefix: Tensor, suffix: Tensor, num_kv_heads: int) -> Tensor:
    """Attends to the first level once for all branches and to the rest branch by branch, and merges both by lse."""
    num_branches, num_qo_heads, head_dim = q.shape
    group = num_qo_heads // num_kv_heads
    per_branch = q.view(num_branches, num_kv_heads, group, head_dim)
    packed = per_branch.transpose(0, 1).reshape(1, num_kv_heads, num_branches * group, head_dim)
    out, lse = attention(packed, *prefix)
    out = out.view(num_kv_heads, num_branches, group, head_dim).transpose(0, 1)
    lse = lse.view(num_kv_heads, num_branches, group).transpose(0, 1)
    own_out, own_lse = attention(per_branch, *suffix)
    share = torch.sigmoid(lse - own_lse.view_as(lse))[..., None]
    return torch.lerp(own_out.float(), out.float(), share).to(q.dtype).view_as(q)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_tree_attention(compare, dtype, name):
    tree = TREES[name]
    torch.manual_seed(0)
    num_branches, path_len = tree.nodes[-1], sum(tree.tokens)
    kv, page_table = make_cache(tree, dtype)
    k_pages, v_pages = kv.transpose(2, 3)
    seq_lens = torch.full((num_branches,), path_len, dtype=torch.int32)
    q = torch.randn(num_branches, tree.num_qo_heads, tree.head_dim).to(dtype)
    group = tree.num_qo_heads // tree.num_kv_heads

    def make_plan():
        return ops.plan_tree(
            page_table, seq_lens, page_size=tree.page_size, num_qo_heads=tree.num_qo_heads,
            num_kv_heads=tree.num_kv_heads, head_dim=tree.head_dim,
        )  # fmt: skip

    plan = make_plan()
    peers = {}
    token_bytes = 2 * tree.num_kv_heads * tree.head_dim * kv.element_size()
    if num_branches * path_len * token_bytes <= MAX_COPY_BYTES:
        copied = dense(kv, page_table)

        def sdpa():
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *copied, enable_gqa=True)

        def sdpa_packed():
            return torch.nn.functional.scaled_dot_product_attention(
                q.view(num_branches, tree.num_kv_heads, group, tree.head_dim), *copied
            )

        peers |= {"SDPA per branch": sdpa, "SDPA per branch, GQA packed": sdpa_packed}
    if len(tree.nodes) > 1 and tree.nodes[0] == 1:
        first = math.ceil(tree.tokens[0] / tree.page_size)
        prefix, suffix = dense(kv, page_table[:1, :first]), dense(kv, page_table[:, first:])
        for title, attention in (("SDPA", attention_with_lse), ("matmul", matmul_with_lse)):
            peers[f"two {title} calls"] = lambda f=attention: two_calls(f, q, prefix, suffix, tree.num_kv_heads)

    out, _ = ops.tree_attention(q, k_pages, v_pages, page_table, seq_lens, plan)
    for title, peer in peers.items():
        torch.testing.assert_close(peer().reshape(out.shape), out, rtol=0.05, atol=0.02, msg=f"{title} disagrees")

    unique = sum(nodes * tokens for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True))
    plan_seconds = harness.best_seconds(make_plan)
    compare(
        lambda: ops.tree_attention(q, k_pages, v_pages, page_table, seq_lens, plan),
        peers,
        num_bytes=unique * token_bytes + 2 * q.nbytes,
        num_flops=4 * tree.head_dim * tree.num_qo_heads * num_branches * path_len,
        dtype=dtype,
        plan_seconds=plan_seconds,
        plan_seconds_per_layer=plan_seconds / NUM_LAYERS,
        path_over_unique=num_branches * path_len / unique,
    )
