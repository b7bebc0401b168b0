"""The CUDA kernels of the page ops on the host: state, page ids and slots of the CPU ops, in any order of threads."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cuda_library, page_kernels
from support import simt_kernels as simt
from support.gpu_cases import GPU
from support.page_cases import STATE_FIELDS, make_pool
from support.tensors import int32

from treedecode import ops, reference
from treedecode.ops.pages import BAD_ARGUMENT, OK, OUT_OF_PAGES, STATUS_ERROR, STATUS_NUM_FREE

seeds = st.one_of(st.sampled_from([0, 1]), st.integers(2, 1000))


# The same tests run on a device, where there is one.
everywhere = pytest.mark.parametrize(
    "run",
    [
        page_kernels.on_host,
        pytest.param(page_kernels.on_device, marks=GPU),
    ],
)


class Pair:
    """A state and its copy: an op runs on one on the CPU and on the other in the CUDA kernel, and both must agree."""

    def __init__(self, state, kv):
        self.cpu, self.cuda = state, state._replace(**{name: getattr(state, name).clone() for name in STATE_FIELDS})
        self.cpu_kv, self.cuda_kv = kv, kv.clone()

    @classmethod
    def make(cls, **sizes):
        pool = make_pool(**sizes)
        return cls(pool.state, pool.kv.copy_(torch.arange(pool.kv.numel()).view_as(pool.kv)))

    def clone(self):
        pair = copy.copy(self)
        pair.__init__(self.cpu._replace(**{n: getattr(self.cpu, n).clone() for n in STATE_FIELDS}), self.cpu_kv.clone())
        return pair

    @property
    def is_possible(self):
        """Returns whether every page counts all rows that have it; with wrong counts the results are undefined."""
        held = torch.zeros_like(self.cpu.refcount)
        for pages, length in zip(self.cpu.page_table, self.cpu.seq_lens.tolist(), strict=True):
            used = pages[: max(0, -(-length // self.cpu.page_size))]
            held += torch.bincount(used[(used >= 0) & (used < len(held))], minlength=len(held))
        return bool((held <= self.cpu.refcount).all())

    def call(self, op, *args, num_slots=None, run=page_kernels.on_host, **options):
        """Returns whether the CPU op accepted the arguments, or its slots if it returns some."""
        names = STATE_FIELDS if self.is_possible else ("page_table", "seq_lens")
        cpu_args, cuda_args = [self.cpu], [self.cuda]
        if op == "append_slots":
            if num_slots is None:
                num_slots = int(args[1].clamp(min=0).sum()) + options.get("seed", 0) % 2
            cpu_slots, cuda_slots = torch.full((2, num_slots), -77).unbind()
            cpu_args += [self.cpu_kv, cpu_slots]
            cuda_args += [self.cuda_kv, cuda_slots.clone()]
        before = {name: getattr(self.cuda, name).clone() for name in STATE_FIELDS}
        kv_before = self.cuda_kv.clone()
        run(op, *cuda_args, *args, **options)
        try:
            getattr(ops, op)(*cpu_args, *args)
        except ValueError:
            assert self.cuda.status[STATUS_ERROR] == (before["status"][STATUS_ERROR] or BAD_ARGUMENT)
            self.cuda.status[STATUS_ERROR] = before["status"][STATUS_ERROR]
            assert all(torch.equal(getattr(self.cuda, name), old) for name, old in before.items())
            assert torch.equal(self.cuda_kv, kv_before)
            assert op != "append_slots" or (cuda_args[2] == -1).all()
            return False
        for name in names:
            got, want = getattr(self.cuda, name), getattr(self.cpu, name)
            if name == "free_pages":
                got, want = got[: self.cpu.status[STATUS_NUM_FREE]], want[: self.cpu.status[STATUS_NUM_FREE]]
            assert torch.equal(got, want), f"{name} after {op}: {got} instead of {want}"
        assert torch.equal(self.cuda_kv, self.cpu_kv)
        if op == "append_slots":
            assert torch.equal(cuda_args[2], cpu_args[2]), f"{cuda_args[2]} instead of {cpu_args[2]}"
        return True

    def reset(self):
        self.cpu.status[STATUS_ERROR] = self.cuda.status[STATUS_ERROR] = OK


@st.composite
def walks(draw):
    """Draws a pair after some appends, forks and holds, and the pages held outside of the table."""
    page_size = draw(st.sampled_from([1, 2, 16]))
    num_rows = draw(st.integers(1, 8))
    pair = Pair.make(num_pages=draw(st.integers(4, 24)), page_size=page_size, max_branches=8, num_layers=1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for _ in range(draw(st.integers(0, 5))):
        n = int(rng.integers(1, num_rows + 1))
        rows = int32(*rng.permutation(num_rows)[:n])
        room = 12 * page_size - pair.cpu.seq_lens[rows].numpy()
        q_lens = int32(*np.minimum(rng.integers(0, 2 * page_size + 2, n), room))
        slots = torch.empty(int(q_lens.sum()), dtype=torch.int64)
        ops.append_slots(pair.cpu, pair.cpu_kv, slots, rows, q_lens)
        ops.fork_branches(pair.cpu, int32(*rng.integers(0, num_rows, n)), rows)
        pair.cpu.status[STATUS_ERROR] = OK
    used = torch.nonzero(pair.cpu.refcount).flatten().int()
    held = used[torch.from_numpy(rng.permutation(len(used))[: rng.integers(0, 4)])]
    ops.hold_pages(pair.cpu, held)
    return Pair(pair.cpu, pair.cpu_kv), held, rng


@everywhere
@settings(max_examples=120, deadline=None)
@given(walk=walks(), seed=seeds, data=st.data())
def test_valid_calls_match_the_cpu(run, walk, seed, data):
    """The calls are forks with any overlap, appends that may run out of pages, holds and adoptions."""
    pair, held, rng = walk
    page_size = pair.cpu.page_size
    for kind in data.draw(
        st.lists(st.sampled_from(["fork", "append", "hold", "drop", "adopt"]), min_size=1, max_size=4)
    ):
        n = int(rng.integers(1, 9))
        rows = rng.permutation(8)[:n]
        if kind == "fork":
            src = rng.integers(0, 8, n)
            lens = [int(rng.integers(0, length + 1)) for length in pair.cpu.seq_lens[src]]
            lens = int32(*lens) if rng.integers(0, 2) else None
            assert pair.call("fork_branches", int32(*src), int32(*rows), lens, seed=seed, run=run)
        elif kind == "append":
            q_lens = np.minimum(rng.integers(0, 2 * page_size + 2, n), 12 * page_size - pair.cpu.seq_lens[rows].numpy())
            assert pair.call("append_slots", int32(*rows), int32(*q_lens), seed=seed, run=run)
        elif kind == "hold":
            used = torch.nonzero(pair.cpu.refcount).flatten().tolist()
            pages = int32(*rng.choice(used, 3)) if used else int32()
            assert pair.call("hold_pages", pages, True, seed=seed, run=run)
            held = torch.cat([held, pages]) if not pair.cpu.status[STATUS_ERROR] else held
        elif kind == "drop":
            assert pair.call("hold_pages", held, False, seed=seed, run=run)
            held = held if pair.cpu.status[STATUS_ERROR] else int32()
        else:
            empty = torch.nonzero(pair.cpu.seq_lens == 0).flatten().tolist()
            if empty and len(held):
                assert pair.call("adopt_pages", held[:12], empty[0], len(held[:12]) * page_size, seed=seed, run=run)
        if rng.integers(0, 2):
            pair.reset()


@everywhere
@settings(max_examples=200, deadline=None)
@given(walk=walks(), seed=seeds, data=st.data())
def test_refuses_what_the_cpu_refuses(run, walk, seed, data):
    """Arguments and state have any values: an address out of range is found before it is used."""
    pair, _, _ = walk
    num_pages, page_size = len(pair.cpu.refcount), pair.cpu.page_size
    wild = st.sampled_from([-(2**31), -1, 0, 1, 2**31 - 1])
    row, page = st.integers(-1, 8), st.integers(-1, num_pages) | wild
    length = st.integers(-1, 12 * page_size + 1) | wild
    n = data.draw(st.integers(0, 5))
    vectors = lambda values: st.lists(values, min_size=n, max_size=n).map(lambda v: int32(*v))  # noqa: E731
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["seq_lens", "page_table", "free_pages", "status"]))
        target = getattr(pair.cpu, name).view(-1)
        index = 1 if name == "status" else data.draw(st.integers(0, len(target) - 1))
        target[index] = data.draw({"seq_lens": length, "status": st.integers(-1, num_pages + 1)}.get(name, page))
    pair = pair.clone()
    op = data.draw(st.sampled_from(["fork_branches", "append_slots", "hold_pages"]))
    if op == "fork_branches":
        args = data.draw(vectors(row)), data.draw(vectors(row)), data.draw(st.none() | vectors(length))
    elif op == "append_slots":
        rows, q_lens = data.draw(vectors(row)), data.draw(vectors(st.integers(-1, 3 * page_size)))
        num_slots = max(0, int(q_lens.clamp(min=0).sum()) + data.draw(st.sampled_from([0, 0, 2, -1])))
        pair.call(op, rows, q_lens, num_slots=num_slots, seed=seed, run=run)
        return
    else:
        args = data.draw(vectors(page)), data.draw(st.booleans())
    pair.call(op, *args, seed=seed, run=run)


@everywhere
@pytest.mark.parametrize("seed", simt.SEEDS)
def test_more_rows_than_threads(run, seed):
    """With 1100 rows, scans continue from one round of the block to the next, and warps take several rows."""
    pair = Pair.make(num_pages=3000, page_size=2, max_branches=1100, max_pages_per_branch=4, num_layers=1, head_dim=1)
    rows = torch.randperm(1100, dtype=torch.int32)
    assert pair.call("append_slots", rows, torch.randint(0, 4, (1100,), dtype=torch.int32), seed=seed, run=run)
    assert pair.call("fork_branches", torch.randint(0, 1100, (1100,), dtype=torch.int32), rows, seed=seed, run=run)
    assert pair.call("append_slots", rows.flip(0), torch.randint(0, 3, (1100,), dtype=torch.int32), seed=seed, run=run)
    used = torch.nonzero(pair.cpu.refcount).flatten().int()
    pages = torch.cat([used, used.flip(0)])
    assert len(pages) > 1024
    assert pair.call("hold_pages", pages, True, seed=seed, run=run)
    assert pair.call("fork_branches", rows, rows, torch.zeros_like(rows), seed=seed, run=run)
    assert pair.call("hold_pages", pages.flip(0), False, seed=seed, run=run)
    assert pair.cpu.status[STATUS_NUM_FREE] == 3000


def test_default_lengths_and_empty_calls():
    pair = Pair.make()
    assert pair.call("append_slots", int32(0, 3), int32(5, 9))
    slots = torch.empty(2, dtype=torch.int64)
    page_kernels.append_slots(pair.cuda, pair.cuda_kv, slots, int32(3, 0))
    want = torch.empty(2, dtype=torch.int64)
    ops.append_slots(pair.cpu, pair.cpu_kv, want, int32(3, 0))
    assert torch.equal(slots, want)
    assert pair.call("fork_branches", int32(), int32())
    assert pair.call("append_slots", int32(), int32())
    assert pair.call("hold_pages", int32(), False)
    assert pair.call("adopt_pages", int32(), 5, 0)


@pytest.mark.parametrize("seed", simt.SEEDS)
def test_the_error_is_sticky(seed):
    pair = Pair.make(num_pages=2)
    assert pair.call("append_slots", int32(0), int32(9), seed=seed)
    assert pair.cuda.status.tolist() == [OUT_OF_PAGES, 2, 3, 0]
    assert pair.call("append_slots", int32(0), int32(1), seed=seed)
    assert pair.call("fork_branches", int32(0), int32(1), seed=seed)
    assert pair.cuda.status.tolist() == [OUT_OF_PAGES, 2, 3, 0]
    pair.reset()
    assert not pair.call("append_slots", int32(0, 0), int32(1, 1), seed=seed)
    pair.cuda.status[STATUS_ERROR] = BAD_ARGUMENT
    slots = torch.zeros(1, dtype=torch.int64)
    page_kernels.append_slots(pair.cuda, pair.cuda_kv, slots, int32(0), seed=seed)
    assert slots.tolist() == [-1]
    assert pair.cuda.status.tolist() == [BAD_ARGUMENT, 2, 3, 0]


@pytest.mark.parametrize("row", [0, 1])
def test_adopt_refuses_pages_on_the_device(row):
    pair = Pair.make()
    assert pair.call("append_slots", int32(0), int32(5))
    for pages in ([0, 7], [0, 24], [-1, 0], [0, 1]):
        assert pair.call("adopt_pages", int32(*pages), row, 5) == (row == 1 and pages == [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [16, 6, 3])
@pytest.mark.parametrize("seed", simt.SEEDS)
def test_copy_pages(dtype, head_dim, seed):
    torch.manual_seed(0)
    got = torch.randint(-99, 99, (3, 2, 8, 5, 4, head_dim)).to(dtype)
    want = got.clone()
    src, dst = int32(0, 3, 4, 1), int32(7, -1, 6, 2)
    for num_tokens in (None, int32(4, 2, 0, 3)):
        page_kernels.copy_pages(got, src, dst, num_tokens, seed=seed)
        reference.copy_pages(want, src, dst, num_tokens)
        assert torch.equal(got, want)
    page_kernels.copy_pages(got, int32(8, -1, 0, 0), int32(1, 1, 8, 1), int32(4, 4, 4, 5), seed=seed)
    assert torch.equal(got, want), "a copy out of range was made"


def test_every_barrier_is_needed():
    """Without the barrier, some order of threads gives another result or an error of the shim."""
    pair = Pair.make(num_pages=200, page_size=4, max_branches=40, num_layers=1)
    rows = torch.arange(40, dtype=torch.int32)
    assert pair.call("append_slots", rows[:3], int32(11, 9, 2))
    assert pair.call("fork_branches", rows % 3, rows)
    assert pair.call("append_slots", rows[3:20], torch.arange(17, dtype=torch.int32) % 6)
    holding, held = pair.clone(), torch.nonzero(pair.cpu.refcount).flatten().int()
    assert holding.call("hold_pages", torch.cat([held, held]))
    twice = rows % 39  # the last row is one of those before
    calls = {
        "append_slots": [(rows, rows % 5), (rows, rows % 5 + 1), (twice, rows % 5)],
        "fork_branches": [(rows.flip(0), rows), (rows, twice), (rows, rows, torch.zeros_like(rows))],
        "hold_pages": [(torch.cat([held, held.flip(0)]), False), (held.repeat(9), False), (held, True)],
    }
    for op, arguments in calls.items():
        state = holding if op == "hold_pages" else pair
        simt.barriers_seen()
        for args in arguments:
            state.clone().call(op, *args)
        sites = [site for site in simt.barriers_seen() if site.startswith("pages.cuh")]
        assert len(sites) >= 2
        for drop in sites:

            def goes_wrong(op=op, arguments=arguments, state=state, drop=drop):
                tries = ((args, seed) for seed in range(60) for args in arguments)
                return any(is_wrong(state.clone(), op, args, seed, drop) for args, seed in tries)

            assert simt.is_noticed(goes_wrong), f"{op} without {drop}"


def is_wrong(pair, op, args, seed, drop):
    """Returns whether the results of a call differ from those of the CPU."""
    try:
        pair.call(op, *args, seed=seed, drop=drop)
    except (AssertionError, simt.KernelError):
        return True
    return False


@cuda_library.needs_library
@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("fork_branches", {"src": torch.zeros(2)}),
        ("fork_branches", {"dst": int32(1)}),
        ("fork_branches", {"lens": torch.zeros(2, dtype=torch.int64)}),
        ("fork_branches", {"status": int32(0, 1)}),
        ("fork_branches", {"page_size": 0}),
        ("append_slots", {"slots": int32(0, 0)}),
        ("append_slots", {"kv": torch.zeros(1, 2, 5, 2, 4, 8)}),
        ("append_slots", {"kv": torch.zeros(1, 2, 6, 4, 2, 8).transpose(3, 4)}),
        ("append_slots", {"rows": torch.zeros(4, dtype=torch.int32)[::2]}),
        ("append_slots", {"q_lens": int32(1)}),
        ("hold_pages", {"pages": torch.zeros(2, 2, dtype=torch.int32)}),
        ("hold_pages", {"free_pages": int32(1)}),
        ("adopt_pages", {"row": 3}),
        ("adopt_pages", {"num_tokens": 4}),
        ("adopt_pages", {"num_tokens": 9}),
        ("adopt_pages", {"num_tokens": -1, "pages": int32()}),
        ("adopt_pages", {"pages": torch.zeros(6, dtype=torch.int32)}),
        ("adopt_pages", {"page_table": torch.zeros(3, dtype=torch.int32)}),
        ("copy_pages", {"kv": torch.zeros(1, 3, 6, 2, 4, 8)}),
        ("copy_pages", {"num_tokens": torch.zeros(2)}),
    ],
)
def test_same_errors_as_the_cpu_op(op, change):
    pool = make_pool(num_pages=6, max_branches=3, max_pages_per_branch=5, num_layers=1, head_dim=8)
    ids, slots = int32(0, 1), torch.zeros(2, dtype=torch.int64)
    state = dict(zip(STATE_FIELDS, pool.state[:5], strict=True))
    args = {
        "fork_branches": state | {"src": ids, "dst": ids, "lens": None, "page_size": 4},
        "append_slots": state | {"kv": pool.kv, "slots": slots, "rows": ids, "q_lens": None, "page_size": 4},
        "hold_pages": {k: state[k] for k in ("refcount", "free_pages", "status")} | {"pages": ids, "hold": True},
        "adopt_pages": {k: state[k] for k in ("refcount", "page_table", "seq_lens", "status")}
        | {"pages": ids, "row": 2, "num_tokens": 7, "page_size": 4},
        "copy_pages": {"kv": pool.kv, "src": ids, "dst": ids + 2, "num_tokens": None},
    }[op]
    with pytest.raises(ValueError, match=r"^(refcount|kv): expected a CUDA tensor, got cpu$"):
        cuda_library.call(op, *args.values())
    args |= change
    with pytest.raises((ValueError, TypeError)) as native:
        ops._native.call(getattr(torch.ops.treedecode, op).default, *args.values())
    with pytest.raises(native.type) as cuda:
        cuda_library.call(op, *args.values())
    assert str(cuda.value) == str(native.value)
    assert str(native.value).startswith(next(iter(change)))
