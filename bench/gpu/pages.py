"""Times page ops in a decoding loop of 64 branches: `python -m bench.gpu.pages [--only NAME] [--smoke]`.

The pool has the shape of Llama-3-8B. 1,000 captured steps, each a reorder by random parents and an append, run without
a host sync and must leave exactly the state that the CPU's ops leave.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu import harness, timing
from bench.gpu.backends import kernels
from bench.gpu.contestants import Contestant, NotApplicable
from treedecode.cache.page_pool import PagePool
from treedecode.ops.pages import STATUS_NUM_FREE


@dataclass(frozen=True)
class Shape:
    num_layers: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    num_branches: int = 64
    num_tokens: int = 2056  # ends in the middle of a page: the first append after a fork copies it
    num_steps: int = 1000
    dense_layers: int = 4  # the part of a dense cache that is reordered as a peer

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * torch.bfloat16.itemsize


SMOKE = Shape(2, 2, 8, 4, 6, 10, 40, 2)
INT32 = 4


def make_pool(shape: Shape, device: torch.device, *, with_kv: bool = True) -> PagePool:
    per_branch = -(-(shape.num_tokens + shape.num_steps + 1) // shape.page_size)
    own = -(-shape.num_steps // shape.page_size) + 2
    return PagePool(
        num_layers=shape.num_layers if with_kv else 0,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_pages=per_branch + shape.num_branches * own,
        page_size=shape.page_size,
        max_branches=shape.num_branches,
        max_pages_per_branch=per_branch,
        dtype=torch.bfloat16,
        device=device,
    )


Prepare = Callable[["Loop"], Callable[[], object]]


class Loop:
    """Does the page work of a decoding loop on fixed buffers, by the page ops of one backend."""

    def __init__(self, shape: Shape, device: torch.device, backend: str | None, *, with_kv: bool = True) -> None:
        self.shape, self.device = shape, device
        self.pool = pool = make_pool(shape, device, with_kv=with_kv)
        if backend is None:
            self.ops = {op: getattr(torch.ops.treedecode, op).default for op in ("fork_branches", "append_slots")}
        else:
            self.ops = {op: kernels(op, device)[backend] for op in ("fork_branches", "append_slots")}
        self.rows = torch.from_numpy(pool.allocate_rows(shape.num_branches)).to(device)
        self.slots = torch.empty(shape.num_branches, dtype=torch.int64, device=device)
        # every step keeps some branches, drops some and forks some
        generator = torch.Generator().manual_seed(0)
        parents = torch.randint(0, shape.num_branches, (shape.num_steps, shape.num_branches), generator=generator)
        self.parents = parents.to(torch.int32).to(device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # all branches share the prompt
        pool.append(self.rows[:1], [shape.num_tokens])
        pool.fork(self.rows[:1].repeat(shape.num_branches - 1), self.rows[1:])
        self._before = [x.clone() for x in pool.state[:5]]

    def restart(self) -> None:
        """Restores the page state of the beginning, including the order of the free pages."""
        for x, before in zip(self.pool.state[:5], self._before, strict=True):
            x.copy_(before)
        self.step.zero_()

    def fork(self, parents: Tensor) -> None:
        state = self.pool.state
        self.ops["fork_branches"](*state[:5], parents, self.rows, None, state.page_size)

    def append(self) -> None:
        state = self.pool.state
        self.ops["append_slots"](*state[:5], self.pool.kv, self.slots, self.rows, None, state.page_size)

    def next_step(self) -> None:
        """Reorders by the parents of the current step, which a counter on the device selects, and appends."""
        self.fork(self.parents.index_select(0, self.step)[0])
        self.append()
        self.step.add_(1)

    def state(self) -> list[Tensor]:
        """Returns the defined parts of the page state, on the host."""
        pool = self.pool
        num_free, lens = int(pool.status[STATUS_NUM_FREE]), pool.seq_lens.cpu()
        used = torch.arange(pool.page_table.shape[1]) * pool.page_size < lens[:, None]
        others = (pool.refcount, pool.free_pages[:num_free], lens, pool.status, self.slots)
        return [pool.page_table.cpu()[used], *(x.cpu() for x in others)]


class DenseReorder:
    """Reorders some layers of a dense cache by `index_select`, as dense caches do at each beam step."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        size = (2, shape.num_branches, shape.num_kv_heads, shape.num_tokens, shape.head_dim)
        self.kv = torch.ones(size, dtype=torch.bfloat16, device=device)
        self.parents = torch.randint(0, shape.num_branches, (shape.num_branches,), device=device)
        self.num_layers = shape.dense_layers

    def __call__(self, _: int) -> Tensor:
        for _ in range(self.num_layers):
            reordered = self.kv[0].index_select(0, self.parents), self.kv[1].index_select(0, self.parents)
        return torch.stack([x[0, 0, 0] for x in reordered])


def backends(session: harness.Session) -> list[str]:
    forks, appends = kernels("fork_branches", session.device), kernels("append_slots", session.device)
    return [name for name in forks if name in appends]


def append_and_cut(loop: Loop, kept: int) -> Callable[[], object]:
    """Returns a function that appends a token to every branch and cuts it off again, so that calls are alike."""
    lens = torch.full_like(loop.rows, kept)
    state = loop.pool.state

    def work() -> None:
        loop.append()
        loop.ops["fork_branches"](*state[:5], loop.rows, loop.rows, lens, state.page_size)

    return work


def private(loop: Loop) -> Callable[[], object]:
    """Prepares appends to branches that each have a last page of their own with room for a token."""
    loop.append()
    return append_and_cut(loop, loop.shape.num_tokens + 1)


def copying(loop: Loop) -> Callable[[], object]:
    """Prepares appends to branches that share a half-full last page, which all but one copy in all layers."""
    lens = torch.full_like(loop.rows, loop.shape.num_tokens)
    root = torch.zeros_like(loop.rows)
    state = loop.pool.state

    def work() -> None:
        loop.append()
        loop.ops["fork_branches"](*state[:5], root, loop.rows, lens, state.page_size)

    return work


def reorder(loop: Loop) -> Callable[[], object]:
    """Prepares permutations of branches with pages of their own; none is lost, so that calls are alike."""
    loop.append()
    parents = torch.randperm(len(loop.rows), generator=torch.Generator().manual_seed(0)).int().to(loop.device)
    return lambda: loop.fork(parents)


def step(loop: Loop) -> Callable[[], object]:
    """Prepares a reorder, an append, and a cut back to the length before."""
    loop.append()
    parents = torch.randperm(len(loop.rows), generator=torch.Generator().manual_seed(0)).int().to(loop.device)
    append_and_cut_back = append_and_cut(loop, loop.shape.num_tokens + 1)

    def work() -> None:
        loop.fork(parents)
        append_and_cut_back()

    return work


def run_timed(session: harness.Session, shape: Shape, name: str, num_bytes: float, prepare: Prepare) -> None:
    def build(backend: str) -> Contestant:
        loop = Loop(shape, session.device, backend)
        work = prepare(loop)

        def call(_: int) -> Tensor:
            work()
            return loop.pool.status[:1]

        return Contestant(call)

    def dense() -> Contestant:
        if prepare not in (reorder, step):
            raise NotApplicable("a dense cache has no such step")
        notes = f"{shape.dense_layers} of {shape.num_layers} layers"
        return Contestant(DenseReorder(shape, session.device), notes=notes)

    session.measure(
        name,
        {f"treedecode {backend}": functools.partial(build, backend) for backend in backends(session)},
        {"index_select of a dense cache": dense},
        num_bytes=num_bytes,
        num_flops=0,
        dtype=torch.bfloat16,
    )


def run_captured(session: harness.Session, shape: Shape, name: str, num_bytes: float) -> None:
    """Runs all steps by replays of one graph without a host sync, and compares the final state with the CPU's."""
    on_gpu = session.device.type == "cuda"
    host = Loop(shape, torch.device("cpu"), None, with_kv=False)
    for _ in range(shape.num_steps):
        host.next_step()
    want = host.state()

    def build(backend: str) -> Contestant:
        loop = Loop(shape, session.device, backend)
        replay = capture(loop) if on_gpu else loop.next_step

        def run_all() -> None:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(shape.num_steps):
                    replay()
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")

        def call(_: int) -> list[Tensor]:
            loop.restart()
            run_all()
            loop.pool.check_integrity()
            return loop.state()

        def differs() -> float:
            return float(not all(map(torch.equal, call(0), want)))

        def steps() -> timing.Timing:
            return timing.run_seconds(run_all, loop.restart, shape.num_steps, session.device)

        return Contestant(call, error=differs, timing=steps, notes=f"{shape.num_steps} replays of a graph of one step")

    ours = {f"treedecode {backend}": functools.partial(build, backend) for backend in backends(session)}
    session.measure(name, ours, {}, num_bytes=num_bytes, num_flops=0, dtype=torch.bfloat16)


def capture(loop: Loop) -> Callable[[], None]:
    side = torch.cuda.Stream(loop.device)  # the first run loads and compiles kernels, which capture forbids
    side.wait_stream(torch.cuda.current_stream(loop.device))
    with torch.cuda.stream(side):
        loop.next_step()
    torch.cuda.synchronize(loop.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.next_step()
    return graph.replay


def main(argv: Sequence[str] | None = None) -> int:
    args = harness.parser(__doc__).parse_args(argv)
    session = harness.Session("pages", args)
    shape = SMOKE if args.smoke else Shape()
    # any page step must read and write the rows of the table
    table = 2 * shape.num_branches * -(-shape.num_tokens // shape.page_size) * INT32
    copied = 2 * (shape.num_branches - 1) * (shape.num_tokens % shape.page_size) * shape.token_bytes
    cases: dict[str, tuple[float, Prepare | None]] = {
        "append, cut back": (table, private),
        "append with copies of 63 half pages, fork": (table + copied, copying),
        "reorder": (table, reorder),
        "reorder, append, cut back": (table, step),
        "1,000 captured steps": (table, None),
    }
    size = f"{shape.num_branches} branches of {shape.num_tokens} tokens"
    for title, (num_bytes, prepare) in session.cases({f"{name}, {size}": case for name, case in cases.items()}):
        if prepare is None:
            run_captured(session, shape, title, num_bytes)
        else:
            run_timed(session, shape, title, num_bytes, prepare)
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
