"""Inputs of tree_attention with NaN wherever the op must not read, and the error that it is allowed."""

import dataclasses
import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from support.forests import as_tables, tree_rows

from treedecode import ops, reference


@dataclass(frozen=True, eq=False)
class Case:
    """One call of `ops.tree_attention`."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    plan: ops.TreePlan
    options: dict

    @property
    def args(self):
        return self.q, self.k_pages, self.v_pages, self.page_table, self.seq_lens, self.plan

    def run(self):
        return ops.tree_attention(*self.args, **self.options)


_made = {}  # tests of each instruction set use the same cases


def make_case(forest, q_lens=None, **options):
    """Returns `_make_case`, made once for equal arguments."""
    key = repr((forest[0].tolist(), forest[1].tolist(), q_lens, sorted(options.items())))
    if key not in _made:
        _made[key] = _make_case(forest, q_lens, **options)
    return _made[key]


def _make_case(
    forest,
    q_lens=None,
    *,
    page_size=16,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=32,
    dtype=torch.float32,
    layout="NHD",
    spread=1.0,
    seed=0,
    **options,
):
    """Makes a case on a forest (page_table, seq_lens), with random page ids, and NaN in every slot without a token."""
    generator = torch.Generator().manual_seed(seed)
    page_table, seq_lens = forest
    if q_lens is not None:
        q_lens = torch.as_tensor(q_lens, dtype=torch.int32)
    used = torch.arange(page_table.shape[1]) * page_size < seq_lens[:, None]
    ids, dense = page_table[used].unique(return_inverse=True)
    num_pages = len(ids) + 3
    page_table = page_table.clone()
    page_table[used] = torch.randperm(num_pages, generator=generator)[dense].int()

    shape = (num_pages, page_size, num_kv_heads, head_dim)
    if layout == "HND":
        pages = torch.full((2, num_pages, num_kv_heads, page_size, head_dim), torch.nan, dtype=dtype).transpose(2, 3)
    else:
        pages = torch.full((2, *shape), torch.nan, dtype=dtype)
    for row, seq_len in zip(page_table, seq_lens.tolist(), strict=True):
        position = torch.arange(seq_len)
        page, slot = row[position // page_size].long(), position % page_size
        pages[:, page, slot] = torch.randn(2, seq_len, num_kv_heads, head_dim, generator=generator).to(dtype)
    plan = ops.plan_tree(
        page_table,
        seq_lens,
        q_lens,
        page_size=page_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    num_q = int(plan.q_indptr[-1])
    fused = spread * torch.randn(num_q, num_qo_heads + 2, head_dim, generator=generator)
    q = fused.to(dtype)[:, 1:-1]  # strided, as a fused projection leaves it
    return Case(q, pages[0], pages[1], page_table, seq_lens, plan, options)


def interleaved_case(**options):
    """Makes a case of 3 prompts with 4 branches each, in turns, whose branches have 1 to 3 queries."""
    rows = [
        [*range(100 * prompt, 100 * prompt + 9), 1000 + 10 * branch + prompt]
        for branch in range(4)
        for prompt in range(3)
    ]
    return make_case(as_tables(rows, 16, [4 + i for i in range(12)]), q_lens=[1 + i % 3 for i in range(12)], **options)


def permuted(case, seed):
    """Permutes the branches of a case; also returns where each query token of the result was in the case."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(case.seq_lens), generator=generator)
    q_lens = case.plan.q_indptr.diff()
    page_table, seq_lens = case.page_table[order], case.seq_lens[order]
    heads = {"num_qo_heads": case.q.shape[1], "num_kv_heads": case.k_pages.shape[2], "head_dim": case.q.shape[2]}
    plan = ops.plan_tree(page_table, seq_lens, q_lens[order], page_size=case.k_pages.shape[1], **heads)
    tokens = torch.cat([torch.arange(*case.plan.q_indptr[i : i + 2].tolist()) for i in order.tolist()])
    again = dataclasses.replace(case, q=case.q[tokens], page_table=page_table, seq_lens=seq_lens, plan=plan)
    return again, tokens


def with_null_pages(case):
    """Replaces pages that no query's window reaches by one page of NaN, as an engine that frees them does."""
    num_pages, page_size = case.k_pages.shape[:2]
    null = torch.full((1, *case.k_pages.shape[1:]), torch.nan, dtype=case.k_pages.dtype)
    table = case.page_table.clone()
    for row, (seq_len, q_len) in enumerate(
        zip(case.seq_lens.tolist(), case.plan.q_indptr.diff().tolist(), strict=True)
    ):
        table[row, : max(0, seq_len - q_len - case.options["window_left"]) // page_size] = num_pages
    assert (table == num_pages).any()
    heads = {"num_qo_heads": case.q.shape[1], "num_kv_heads": case.k_pages.shape[2], "head_dim": case.q.shape[2]}
    plan = ops.plan_tree(table, case.seq_lens, case.plan.q_indptr.diff(), page_size=page_size, **heads)
    pages = {"k_pages": torch.cat([case.k_pages, null]), "v_pages": torch.cat([case.v_pages, null])}
    return dataclasses.replace(case, **pages, page_table=table, plan=plan)


def window_case(dtype, page_size):
    """Makes a case of two trees, whose rows have windows that begin in other pages, and in the middle of a page."""
    rows = [[*range(20), *range(20 + 5 * i, 20 + 5 * i + i)] for i in range(1, 5)] + [
        [*range(100, 120 + i)] for i in (0, 2)
    ]
    forest = as_tables(rows, page_size, [1 + i % page_size for i in range(6)])
    q_lens = [1, 3, 1, 2, 1, 1] if page_size > 2 else None
    return make_case(forest, q_lens, page_size=page_size, dtype=dtype, window_left=9)


def same_in_torch(case, dtype):
    """Computes (out, lse, size) by torch operators in `dtype`, branch by branch.

    size is the sum of |weight * value| times 1 + the largest score: how much an ulp of each term, and of each score,
    can change the result.
    """
    options = {"sm_scale": None, "window_left": -1, "logits_soft_cap": 0.0, "sinks": None} | case.options
    num_q, num_qo_heads, head_dim = case.q.shape
    num_kv_heads = case.k_pages.shape[2]
    scale = head_dim**-0.5 if options["sm_scale"] is None else options["sm_scale"]
    out = torch.zeros(num_q, num_qo_heads, head_dim, dtype=dtype)
    lse = torch.full((num_q, num_qo_heads), -torch.inf, dtype=dtype)
    size = torch.zeros(num_q, num_qo_heads, head_dim, dtype=dtype)
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        begin, end = case.plan.q_indptr[row : row + 2].tolist()
        sinks = torch.full((num_qo_heads,), -torch.inf) if options["sinks"] is None else options["sinks"]
        lse[begin:end] = sinks.to(dtype)
        if seq_len == 0 or begin == end:
            continue
        page_size = case.k_pages.shape[1]
        pages = case.page_table[row, : -(-seq_len // page_size)].long()
        k, v = (
            x[pages]
            .flatten(0, 1)[:seq_len]
            .to(dtype)
            .repeat_interleave(num_qo_heads // num_kv_heads, 1)
            .transpose(0, 1)
            for x in (case.k_pages, case.v_pages)
        )
        score = case.q[begin:end].to(dtype).transpose(0, 1) @ k.mT * scale
        largest = score.abs().amax(-1).T[..., None]
        if options["logits_soft_cap"] > 0:
            score = options["logits_soft_cap"] * torch.tanh(score / options["logits_soft_cap"])
        key = torch.arange(seq_len)
        position = torch.arange(seq_len - (end - begin), seq_len)[:, None]
        masked = key > position
        if options["window_left"] >= 0:
            masked |= key < position - options["window_left"]
        sink = sinks.to(dtype)[:, None, None].expand(-1, end - begin, 1)
        score = torch.cat([score.masked_fill(masked, -torch.inf), sink], -1)
        lse[begin:end] = score.logsumexp(-1).T
        weight = score.softmax(-1)[..., :-1]
        out[begin:end] = (weight @ v).transpose(0, 1)
        size[begin:end] = (weight @ v.abs()).transpose(0, 1) * (1 + largest)
    return out, lse, size


@functools.lru_cache(maxsize=512)
def truth(case):
    """Returns (exact out, exact lse, out by torch in the dtype of q, lse by torch in fp32, size in fp32)."""
    peer, _, _ = same_in_torch(case, case.q.dtype)
    _, peer_lse, size = same_in_torch(case, torch.float32)
    return *reference.tree_attention(*case.args, **case.options), peer, peer_lse, size


def assert_within_budget(case, got):
    """Asserts that results are as good as those of torch operators.

    `out`: the worst error of torch in the dtype of q on the same branch, plus the rounding of the result, plus a few
    fp32 ulps of the scores and of the terms that are summed. `lse`: the same with torch in fp32, always.
    """
    out, lse = got
    dtype = case.q.dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact, exact_lse, peer, peer_lse, size = truth(case)
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    few_ulps = 8 * torch.finfo(torch.float32).eps
    for begin, end in pairwise(case.plan.q_indptr.tolist()):
        if begin == end:
            continue
        rows = slice(begin, end)
        budget = (
            (peer[rows].double() - exact[rows]).abs().max()
            + torch.finfo(dtype).eps * exact[rows].abs()
            + few_ulps * size[rows].double()
        )
        error = (out[rows].double() - exact[rows]).abs()
        assert (error <= budget).all(), f"tokens {begin}:{end}: {(error / budget).max():.2f} of the budget"
        keys = ~exact_lse[rows].isneginf()
        if not keys.any():
            continue
        lse_error = (lse[rows].double() - exact_lse[rows])[keys].abs()
        lse_budget = (peer_lse[rows].double() - exact_lse[rows])[keys].abs().max() + few_ulps * (
            1 + exact_lse[rows][keys].abs()
        )
        assert (lse_error <= lse_budget).all(), (
            f"tokens {begin}:{end}: lse {(lse_error / lse_budget).max():.2f} of the budget"
        )


def ragged(rows, page_size, seed=0):
    """Makes (page_table, seq_lens) of rows of page ids, with random numbers of tokens in the last pages."""
    generator = torch.Generator().manual_seed(seed)
    return as_tables(rows, page_size, torch.randint(1, page_size + 1, (len(rows),), generator=generator).tolist())


def assert_idle_tokens_are_left_out(case, run):
    """Asserts that `run(case)` gives query tokens beyond the plan 0 and -inf, and the others the same results."""
    want = run(case)
    more = dataclasses.replace(case, q=torch.cat([case.q, case.q.new_full((3, *case.q.shape[1:]), torch.nan)]))
    out, lse = run(more)
    assert torch.equal(out[:-3], want[0])
    assert torch.equal(lse[:-3], want[1])
    assert not out[-3:].any()
    assert lse[-3:].isneginf().all()


def two_trees_and_loners(page_size):
    """Makes a forest: three levels, two levels, single rows, forks inside of shared pages, an empty row."""
    unit = max(1, 32 // page_size)
    deep = tree_rows([2, 3], [5 * unit, 2 * unit, unit])
    wide = [[1000 + page for page in row] for row in tree_rows([4], [3 * unit, 1])]
    stub = deep[-1][: 2 * unit]
    return ragged([*deep, stub, wide[0], [5000], *wide[1:], [], list(range(6000, 6000 + 4 * unit))], page_size)
