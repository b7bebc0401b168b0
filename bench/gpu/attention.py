"""Times tree_attention beside other libraries: `python -m bench.gpu.attention [--only NAME] [--smoke]`.

Every backend of ours has a row of its own, and every peer that cannot take part is listed with the reason.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu import attention_peers, forests, harness, timing
from bench.gpu.backends import kernels
from bench.gpu.contestants import Builders, Contestant
from bench.gpu.forests import Forest, Heads, Inputs
from treedecode.ops.plan_tree import default_workers

NUM_LAYERS = 32  # a plan is made once per step and used by this many layers
NUM_CHECKED = 8  # branches compared with float64
MAIN = Heads()
OTHER_HEADS = (Heads(64, 8, 128), Heads(32, 32, 128), Heads(8, 1, 128), Heads(32, 8, 64))

TREES = {
    "1,10 / 4000,400": ((1, 10), (4000, 400)),
    "1,64 / 8192,256": ((1, 64), (8192, 256)),
    "1,128 / 32768,64": ((1, 128), (32768, 64)),
    "16,128 / 4096,512": ((16, 128), (4096, 512)),
    "1,16,64 / 1024,256,32": ((1, 16, 64), (1024, 256, 32)),
    "1,4,16,512 / 1024,256,128,32": ((1, 4, 16, 512), (1024, 256, 128, 32)),
    "1,8,64,512 / 4096,1024,256,64": ((1, 8, 64, 512), (4096, 1024, 256, 64)),
    "1,4,16,64,256,1024 / 256,8,256,64,32,256": ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
    "256 / 4096": ((256,), (4096,)),
}
WITH_OTHER_HEADS = ("1,64 / 8192,256", "1,16,64 / 1024,256,32", "1,8,64,512 / 4096,1024,256,64", "256 / 4096")
# Forests where sharing has the least to give, or that are no single tree.
LOSING: dict[str, tuple[Heads, Callable[[int], Forest]]] = {
    "1,8 / 4000,32": (Heads(8, 1, 128), lambda page_size: forests.tree((1, 8), (4000, 32), page_size)),
    "1,128 / 128,32": (MAIN, lambda page_size: forests.tree((1, 128), (128, 32), page_size)),
    "64 leaves among 192 singletons": (MAIN, forests.deep_leaf_among_singletons),
    "ragged depths": (MAIN, forests.ragged),
    "forks within a page": (MAIN, lambda page_size: forests.tree((1, 8, 64), (2041, 251, 35), page_size)),
    "unsorted rows": (MAIN, lambda page_size: forests.unsorted(forests.tree((1, 16, 64), (1024, 256, 32), page_size))),
}
SMOKE = {
    "1,3 / 20,5": (Heads(4, 2, 16), lambda page_size: forests.tree((1, 3), (20, 5), page_size)),
    "1,2,6 / 9,17,4": (Heads(4, 2, 16), lambda page_size: forests.tree((1, 2, 6), (9, 17, 4), page_size)),
    "64 leaves among 192 singletons": (
        Heads(4, 2, 16),
        lambda page_size: forests.deep_leaf_among_singletons(page_size, 64, 3, 3),
    ),
    "ragged depths": (Heads(2, 2, 16), lambda page_size: forests.ragged(page_size, 5, 60)),
    "unsorted rows": (
        Heads(4, 1, 16),
        lambda page_size: forests.unsorted(forests.tree((1, 4), (20, 4), page_size)),
    ),
}


def all_cases(smoke: bool) -> dict[str, tuple[Heads, Callable[[], Forest]]]:
    """Returns heads and a function that makes the forest, by name; the main table first, in case time runs out."""

    def build_tree(name: str, page_size: int) -> Forest:
        return forests.tree(*TREES[name], page_size)

    cases: dict[str, tuple[Heads, Callable[[], Forest]]] = {}

    def add(name: str, heads: Heads, page_size: int, build: Callable[[int], Forest]) -> None:
        title = f"{name}, {heads.num_qo_heads}/{heads.num_kv_heads} d{heads.head_dim} page {page_size}"
        cases[title] = (heads, functools.partial(build, page_size))

    if smoke:
        for name, (heads, build) in SMOKE.items():
            add(name, heads, 4, build)
        return cases
    for name in TREES:
        add(name, MAIN, 16, functools.partial(build_tree, name))
    for name, (heads, build) in LOSING.items():
        add(name, heads, 16, build)
    for heads in OTHER_HEADS:
        for name in WITH_OTHER_HEADS:
            add(name, heads, 16, functools.partial(build_tree, name))
    for name in TREES:
        add(name, MAIN, 64, functools.partial(build_tree, name))
    for name, (heads, build) in LOSING.items():
        add(name, heads, 64, build)
    return cases


def checked_rows(num_branches: int) -> list[int]:
    return sorted({i * (num_branches - 1) // max(1, NUM_CHECKED - 1) for i in range(NUM_CHECKED)})


def truth(inputs: Inputs, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Computes out and lse of some branches in float64 from copies of their keys and values."""
    group = inputs.heads.num_qo_heads // inputs.heads.num_kv_heads
    outs, lses = [], []
    for row in rows:
        k, v = inputs.keys_of(row).double()
        q = inputs.q[0][row].double().unflatten(0, (-1, group))
        score = q @ k.mT * inputs.heads.head_dim**-0.5
        outs.append((score.softmax(-1) @ v).flatten(0, 1))
        lses.append(score.logsumexp(-1).flatten())
    return torch.stack(outs), torch.stack(lses)


def our_backends(inputs: Inputs, check: Callable[..., float], limit: float) -> Builders:
    heads, forest = inputs.heads, inputs.forest
    sizes = (forest.page_size, heads.num_qo_heads, heads.num_kv_heads, heads.head_dim)

    def build(attend: Callable[..., tuple[Tensor, Tensor]], make_plan: Callable[..., tuple]) -> Contestant:
        workers = default_workers(inputs.device)

        def plan() -> tuple:
            return make_plan(inputs.page_table, inputs.seq_lens, None, *sizes, workers)

        planned = plan()

        def call(i: int) -> tuple[Tensor, Tensor]:
            q, scale = inputs.q[i], heads.head_dim**-0.5
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
            tables = (*inputs.pages(i), inputs.page_table, inputs.seq_lens)
            attend(q, *tables, *planned, out, lse, scale, -1, 0.0, None, False)
            return out, lse

        return Contestant(call, len(inputs.q), lambda: check(*call(0)), limit, plan)

    planners = kernels("plan_tree", inputs.device)
    return {
        # a backend without a planner of its own takes the one that is dispatched
        f"treedecode {name}": functools.partial(
            build, attend, planners.get(name, torch.ops.treedecode.plan_tree.default)
        )
        for name, attend in kernels("tree_attention", inputs.device).items()
    }


def run(session: harness.Session, name: str, heads: Heads, forest: Forest) -> None:
    dtype = torch.bfloat16
    token_bytes = 2 * heads.num_kv_heads * heads.head_dim * dtype.itemsize
    unique_bytes = forest.unique_tokens * token_bytes
    sets = timing.num_sets(unique_bytes, session.device)
    inputs = forests.make_inputs(forest, heads, dtype, session.device, sets)
    rows = checked_rows(len(forest.rows))
    want_out, want_lse = truth(inputs, rows)
    # Rounding weights and result to bf16, as every kernel of the field does, gives an error of about an eps
    limit = 2 * torch.finfo(dtype).eps

    def check(out: Tensor, lse: Tensor | None = None) -> float:
        """Returns the error of out, or a hundred times that of lse, which comes from fp32 sums of exact products."""
        errors = [harness.relative_error(out[rows], want_out)]
        if lse is not None:
            errors.append(100 * harness.relative_error(lse[rows], want_lse))
        return harness.worst(errors)

    session.measure(
        name,
        our_backends(inputs, check, limit),
        attention_peers.attention_peers(inputs, check, limit),
        num_bytes=unique_bytes + 2 * inputs.q[0].nbytes,
        num_flops=4 * heads.head_dim * heads.num_qo_heads * forest.path_tokens,
        dtype=dtype,
        num_layers=NUM_LAYERS,
        unique_bytes=unique_bytes,
        path_over_unique=forest.path_tokens / forest.unique_tokens,
        num_branches=len(forest.rows),
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = harness.parser(__doc__).parse_args(argv)
    session = harness.Session("attention", args)
    for name, (heads, build) in session.cases(all_cases(args.smoke)):
        run(session, name, heads, build())
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
