"""Calls every op once or twice on small inputs, for compute-sanitizer: `python -m bench.gpu.sanitize [--backend cuda]`.

The results are not checked, which is the tests' work. Sizes are odd, so that kernels run their tails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.gpu import forests
from bench.gpu.backends import kernels
from bench.gpu.forests import Heads
from treedecode import ops
from treedecode.cache.page_pool import PagePool
from treedecode.ops.pages import OUT_OF_PAGES, STATUS_ERROR
from treedecode.ops.plan_tree import default_workers

DTYPES = (torch.bfloat16, torch.float32)
PAGE_OPS = ("fork_branches", "append_slots", "hold_pages", "adopt_pages", "copy_pages")
Call = tuple[Any, ...]  # the arguments of an op's schema


def int32(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def attention(device: torch.device) -> Iterator[tuple[str, Call]]:
    deep = forests.tree((1, 2, 6), (75, 21, 9), 16)
    for dtype, heads in ((DTYPES[0], Heads(8, 2, 64)), (DTYPES[0], Heads(32, 1, 128)), (DTYPES[1], Heads(3, 3, 80))):
        inputs = forests.make_inputs(deep, heads, dtype, device, 1)
        sizes = (16, heads.num_qo_heads, heads.num_kv_heads, heads.head_dim)
        for q_lens in (None, int32([1, 5, 0, 2, 1, 9], device)):
            args = (inputs.page_table, inputs.seq_lens, q_lens, *sizes, default_workers(device))
            yield "plan_tree", args
            plan = torch.ops.treedecode.plan_tree(*args)
            num_q = int(plan[0][-1])
            q = torch.randn(num_q, heads.num_qo_heads, heads.head_dim, device=device).to(dtype)
            sinks = torch.randn(heads.num_qo_heads, device=device)
            tables = (*inputs.pages(0), inputs.page_table, inputs.seq_lens)
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
            yield "tree_attention", (q, *tables, *plan, out, None, heads.head_dim**-0.5, -1, 0.0, None, False)
            yield "tree_attention", (q, *tables, *plan, out, lse, heads.head_dim**-0.5, 40, 30.0, sinks, False)


def elementwise(device: torch.device) -> Iterator[tuple[str, Call]]:
    for dtype in DTYPES:
        qkv = torch.randn(13, 8, 24, device=device).to(dtype)
        cos, sin = torch.randn(2, 13, 24, device=device).to(dtype)
        pages = torch.zeros(2, 7, 4, 2, 24, device=device, dtype=dtype)
        slots = torch.randperm(28, device=device)[:13]
        slots[3] = -1
        yield "rotary_embed", (qkv[:, :4], qkv[:, 4:6], cos, sin)
        yield "append_kv", (qkv[:, 4:6], qkv[:, 6:], *pages, slots)
        yield "rms_norm", (qkv, torch.ones(24, device=device, dtype=dtype), 1e-6, True)
        part_lse = torch.randn(9, 3, device=device)
        part_lse[4] = -torch.inf
        yield "merge_states", (torch.randn(9, 3, 72, device=device).to(dtype), part_lse, int32([0, 3, 3, 8, 9], device))


def logits(device: torch.device) -> Iterator[tuple[str, Call]]:
    for dtype in DTYPES:
        x = torch.randn(7, 5003, device=device).to(dtype)
        cum, groups = -torch.rand(7, device=device), int32([0, 3, 3, 7], device)
        mask = torch.full((7, 157), 0x5A5A5A5A, dtype=torch.int32, device=device)
        for k in (5, 300):
            yield "beam_prune", (x, cum, groups, k, None, False)
        yield "beam_prune", (x, cum, groups, 16, mask, True)
        seeds = torch.arange(7, device=device)

        def sample(temperature: float, top_k: int, top_p: float, min_p: float, *rest: Any, x: Tensor = x) -> Call:
            floats = [torch.full((7,), value, device=device) for value in (temperature, top_p, min_p)]
            return x, floats[0], int32([top_k] * 7, device), *floats[1:], *rest

        yield "sample", sample(1.0, 0, 1.0, 0.0, seeds, seeds, None)
        yield "sample", sample(0.7, 50, 0.9, 0.02, seeds, seeds, mask)
    num_beams, width = 3, 8
    indptr = int32([0, num_beams, 2 * num_beams], device)
    scores = -torch.rand(2, width, device=device).sort(dim=1).values
    parent = torch.randint(0, num_beams, (2, width), device=device, dtype=torch.int32)
    parent[1] += num_beams
    token = torch.randint(0, 9, (2, width), device=device, dtype=torch.int32)
    pool = [torch.full((6,), -1e9, device=device), *torch.zeros(3, 6, dtype=torch.int32, device=device)]
    done, limits = torch.zeros(2, dtype=torch.bool, device=device), int32([9, 9], device)
    lens = int32([2, 2], device)
    yield (
        "beam_update",
        (scores, parent, token, indptr, indptr, *pool, done, lens, limits, int32([1], device), 1.0, 0, None),
    )


def pages(device: torch.device, run: Callable[[str, Call], None]) -> None:
    """Runs a short history of page ops, each on the state that those before it left."""
    pool = PagePool(
        num_layers=2, num_kv_heads=2, head_dim=24, num_pages=40, page_size=4, max_branches=9, max_pages_per_branch=12,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    rows, state = int32(pool.allocate_rows(9), device), pool.state

    def append(rows: Tensor, q_lens: Tensor | None, num_slots: int) -> None:
        slots = torch.empty(num_slots, dtype=torch.int64, device=device)
        run("append_slots", (*state[:5], pool.kv, slots, rows, q_lens, 4))

    append(rows[:2], int32([14, 3], device), 20)
    run("fork_branches", (*state[:5], int32([0, 0, 1, 0, 1, 0], device), rows[2:8], None, 4))
    append(rows[:8], None, 8)
    run("fork_branches", (*state[:5], int32([3, 2, 2, 7], device), rows[[2, 3, 4, 7]], int32([9, 5, 0, 3], device), 4))
    held = pool.page_table[0, :3].clone()
    run("hold_pages", (*state[:2], state.status, held, True))
    run("adopt_pages", (state.refcount, state.page_table, state.seq_lens, state.status, held, 8, 10, 4))
    run("hold_pages", (*state[:2], state.status, held, False))
    run("copy_pages", (pool.kv, held[:2], int32([38, -1], device), int32([3, 4], device)))
    append(rows, int32([30] * 9, device), 270)  # more than there is
    if int(pool.status[STATUS_ERROR]) != OUT_OF_PAGES:
        raise RuntimeError(f"expected to be out of pages, got status {pool.status.tolist()}")
    pool.reset_status()
    pool.check_integrity()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("cuda", "triton"), help="only this one's kernels; default: all")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, to run the code")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.smoke else "cuda:0")
    torch.manual_seed(0)
    called: dict[str, set[str]] = {op: set() for op in ops.names()}

    def run(op: str, arguments: Call, backend: str) -> None:
        functions = kernels(op, device)
        if backend in functions:
            functions[backend](*arguments)
            called[op].add(backend)
        elif op in PAGE_OPS:  # the next op needs the state that this one leaves
            getattr(torch.ops.treedecode, op)(*arguments)

    backends = (args.backend,) if args.backend else ("cpu",) if args.smoke else ("cuda", "triton")
    for backend in backends:
        for part in (attention, elementwise, logits):
            for op, arguments in part(device):
                run(op, arguments, backend)
        pages(device, lambda op, arguments, backend=backend: run(op, arguments, backend))
        if device.type == "cuda":
            torch.cuda.synchronize()
    for op, used in called.items():
        print(f"{op}: {', '.join(sorted(used)) or 'no kernel here'}")
    return int(not all(any(backend in used for used in called.values()) for backend in backends))


if __name__ == "__main__":
    sys.exit(main())
