"""`treedecode tune`: measures the backends of each op on this GPU and keeps the faster one, by size."""

import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from treedecode import ops, triton_kernels
from treedecode.ops import _native, _tuned
from treedecode.ops.plan_tree import default_workers

Arguments = tuple[Any, ...]
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 32, 8, 128, 16
_ROWS = (1, 4, 16, 64, 256)


def _int32(*values: Any, device: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _logits(device: Any) -> Iterator[Tensor]:
    for rows in _ROWS:
        for vocab in (32_000, 151_936):
            yield torch.randn(rows, vocab, device=device).bfloat16()


def _sample(device: Any) -> Iterator[Arguments]:
    for logits in _logits(device):
        rows = logits.shape[0]

        def row(value: float, dtype: torch.dtype, rows: int = rows) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        ids = torch.arange(rows, device=device)
        yield (
            logits, row(0.8, torch.float32), row(0, torch.int32), row(0.95, torch.float32), row(0, torch.float32),
            ids, ids, None,
        )  # fmt: skip


def _beam_prune(device: Any) -> Iterator[Arguments]:
    for logits in _logits(device):
        rows = logits.shape[0]
        yield logits, torch.zeros(rows, device=device), _int32(0, rows, device=device), 2 * rows, None, False


def _beam_update(device: Any) -> Iterator[Arguments]:
    """Yields searches of 8 beams whose candidates are no hits, so that every call finds the same pools."""
    for groups in _ROWS:
        beams = torch.arange(groups + 1, dtype=torch.int32, device=device) * 8
        scores = torch.linspace(-1, -9, 16, device=device).repeat(groups, 1)
        parent = (torch.arange(16, dtype=torch.int32, device=device) % 8 + beams[:-1, None]).contiguous()
        free = torch.zeros(3, 8 * groups, dtype=torch.int32, device=device)
        pool = torch.full((8 * groups,), -1e9, device=device), *free
        limits = torch.full((2, groups), 9, dtype=torch.int32, device=device)
        done, eos = torch.zeros(groups, dtype=torch.bool, device=device), _int32(7, device=device)
        yield scores, parent, parent + 100, beams, beams, *pool, done, limits[0], limits[1] * 9, eos, 1.0, 0, None


def _table(rows: int, device: Any) -> tuple[Tensor, Tensor]:
    """Makes a page table and lengths of branches of 4096 shared and 256 own tokens."""
    shared, own = 4096 // _PAGE, 256 // _PAGE
    ids = torch.arange(rows * own, dtype=torch.int32, device=device).view(rows, own) + shared
    first = torch.arange(shared, dtype=torch.int32, device=device).expand(rows, -1)
    table = torch.cat([first, ids], dim=1)
    return table, torch.full((rows,), 4096 + 256, dtype=torch.int32, device=device)


def _plan_tree(device: Any) -> Iterator[Arguments]:
    for rows in _ROWS:
        table, lens = _table(rows, device)
        yield table, lens, None, _PAGE, _HEADS, _KV_HEADS, _HEAD_DIM, default_workers(torch.device(device)) or 264


def _tree_attention(device: Any) -> Iterator[Arguments]:
    for rows in _ROWS:
        table, lens = _table(rows, device)
        plan = ops.plan_tree(
            table, lens, page_size=_PAGE, num_qo_heads=_HEADS, num_kv_heads=_KV_HEADS, head_dim=_HEAD_DIM
        )
        pages = torch.randn(2, int(table.max()) + 1, _PAGE, _KV_HEADS, _HEAD_DIM, device=device).bfloat16()
        q = torch.randn(rows, _HEADS, _HEAD_DIM, device=device).bfloat16()
        out = torch.empty_like(q)
        yield q, *pages, table, lens, *plan.tensors, out, None, _HEAD_DIM**-0.5, -1, 0.0, None, False


def _append_kv(device: Any) -> Iterator[Arguments]:
    for rows in _ROWS:
        kv = torch.randn(2, rows, _KV_HEADS, _HEAD_DIM, device=device).bfloat16()
        pages = torch.zeros(2, rows, _PAGE, _KV_HEADS, _HEAD_DIM, dtype=torch.bfloat16, device=device)
        yield *kv, *pages, torch.arange(rows, device=device) * _PAGE + 3


def _copy_pages(device: Any) -> Iterator[Arguments]:
    for rows in _ROWS:
        kv = torch.zeros(32, 2, 2 * rows, _KV_HEADS, _PAGE, _HEAD_DIM, dtype=torch.bfloat16, device=device)
        ids = torch.arange(rows, dtype=torch.int32, device=device)
        yield kv, ids, ids + rows, torch.full_like(ids, 9)


def _fork_branches(device: Any) -> Iterator[Arguments]:
    """Yields forks of each row into an equal one, so that every call finds the same state."""
    for rows in _ROWS:
        table, lens = _table(rows, device)
        refcount = torch.bincount(table.flatten().long()).int()
        free, status = torch.zeros_like(refcount), _int32(0, 0, 0, 0, device=device)
        ids = torch.arange(rows, dtype=torch.int32, device=device)
        yield refcount, free, table, lens, status, ids.roll(1), ids, None, _PAGE


# Ops that more than one backend has a kernel of, with arguments of growing size. append_slots, hold_pages and
# adopt_pages change the state with every call, and cost about as much as fork_branches: they take its choice.
CASES: dict[str, Callable[[Any], Iterator[Arguments]]] = {
    "append_kv": _append_kv,
    "beam_prune": _beam_prune,
    "beam_update": _beam_update,
    "copy_pages": _copy_pages,
    "fork_branches": _fork_branches,
    "plan_tree": _plan_tree,
    "sample": _sample,
    "tree_attention": _tree_attention,
}


def seconds(call: Callable[[], Any], repeats: int = 20, rounds: int = 7) -> float:
    """Measures a call in a CUDA graph of `repeats` calls; returns the median time of a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def kernels(op: str) -> dict[str, Callable[..., Any]]:
    """Returns the kernels of `op` for CUDA tensors, by backend."""
    by_backend: dict[str, Callable[..., Any]] = {}
    if op in _native.CUDA_OPS:
        by_backend["cuda"] = getattr(torch.ops.treedecode_cuda, op)
    if op in triton_kernels.OPS:
        by_backend["triton"] = triton_kernels.launcher(op)
    return by_backend


def measure(device: Any, report: Callable[[str], None]) -> dict[str, dict[int, dict[str, float]]]:
    """Measures all ops: op -> size class -> backend -> seconds, summed over the shapes of a size class."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    with torch.inference_mode():
        for op, cases in CASES.items():
            candidates = kernels(op)
            if len(candidates) < 2:
                report(f"{op}: only {', '.join(candidates) or 'the CPU'} has a kernel")
                continue
            for args in cases(device):
                times = {name: seconds(partial(call, *args)) for name, call in candidates.items()}
                sums = results.setdefault(op, {}).setdefault(_tuned.size_class(args), dict.fromkeys(times, 0.0))
                for name, value in times.items():
                    sums[name] += value
                shape = list(next(arg.shape for arg in args if isinstance(arg, Tensor)))
                text = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in times.items())
                report(f"{op} {shape}: {text}")
    return results


def tune(report: Callable[[str], None] = print) -> str:
    """Measures this GPU and writes its table; returns the path of the table.

    The table is used by processes that start afterwards.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("treedecode tune measures a GPU, and torch sees none here")
    name = torch.cuda.get_device_name()
    results = measure("cuda", report)
    choices = {
        op: {size: min(times, key=lambda backend: times[backend]) for size, times in sizes.items()}
        for op, sizes in results.items()
    }
    if "fork_branches" in choices:
        usual = statistics.mode(choices["fork_branches"].values())
        choices |= {op: {0: usual} for op in ("append_slots", "hold_pages", "adopt_pages") if len(kernels(op)) == 2}
    path = _tuned.path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "format": _tuned.FORMAT,
        "device": name,
        "torch": torch.__version__,
        "choices": choices,
        "seconds": results,
    }
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(table, indent=1) + "\n")
    unfinished.replace(path)
    return str(path)
