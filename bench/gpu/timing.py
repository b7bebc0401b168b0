"""Times calls on a GPU, captured in a CUDA graph, with warm and with cold caches; and measures the device's peaks.

*Warm*: every call of the graph works on the same inputs. *Cold*: the calls take turns on sets of inputs, so many that a
set is used again only after more than twice the L2 cache has been read. The layers of a model do the same to each
other, and unlike a flush between calls it adds nothing that would have to be timed and subtracted.

Without a GPU the same code runs on the CPU by the wall clock, so that tests can run it.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import GEMM_DTYPES, Peaks, dtype_name
from treedecode.engine.graph_step import leave_failed_capture

ROUNDS = 9
GRAPH_SECONDS = 2e-3  # of a replay: so long that an event's resolution and the launch of the graph do not count
MAX_CALLS = 256


@dataclass(frozen=True)
class Timing:
    """The seconds of one call, as the median of several rounds, and their spread."""

    seconds: float
    spread: float  # (largest - smallest) / median
    method: str  # "graph", "events" (launched one by one, so host time may count) or "clock"


def num_sets(num_bytes: int, device: torch.device) -> int:
    """Returns the number of sets of inputs, of `num_bytes` each, that keep one another out of the L2 cache."""
    if device.type != "cuda":
        return 2
    return 1 + math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / num_bytes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_seconds(function: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> Timing:
    """Times a function by the wall clock, from an idle device to an idle device."""
    function()
    return _timing([_once(function, device) for _ in range(rounds)], 1, "clock")


def _once(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def call_seconds(call: Callable[[int], object], sets: Sequence[int], device: torch.device) -> Timing:
    """Times calls that take turns on `sets`, by replaying a graph of them `ROUNDS` times.

    Raises:
        RuntimeError: the calls cannot be captured.
    """

    def turn() -> None:
        for i in sets:
            call(i)

    if device.type != "cuda":
        timing = clock_seconds(turn, device, rounds=2)
        return Timing(timing.seconds / len(sets), timing.spread, timing.method)
    stream = torch.cuda.Stream(
        device
    )  # graphs are captured on a side stream, and libraries set themselves up per stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            turn()
    torch.cuda.synchronize(device)
    guess = _event_times(turn, 2)[-1]
    turns = max(1, min(MAX_CALLS // len(sets), math.ceil(GRAPH_SECONDS / max(guess, 1e-7))))
    graph, memory = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    before = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=memory):
            for _ in range(turns):
                turn()
    except BaseException:
        leave_failed_capture(before, memory)
        raise
    graph.replay()
    return _timing(_event_times(graph.replay, ROUNDS), turns * len(sets), "graph")


def event_seconds(call: Callable[[int], object], sets: Sequence[int]) -> Timing:
    """Times calls that cannot be captured, launched one by one."""
    for i in sets:
        call(i)
    times = _event_times(lambda: [call(i) for i in sets], ROUNDS)
    return _timing(times, len(sets), "events")


def run_seconds(
    run: Callable[[], object], prepare: Callable[[], object], num_steps: int, device: torch.device, rounds: int = 5
) -> Timing:
    """Times a step of `run`, which does `num_steps` of them after each `prepare` without waiting for the device."""
    times = []
    for _ in range(rounds):
        prepare()
        synchronize(device)
        times += _event_times(run, 1) if device.type == "cuda" else [_once(run, device)]
    return _timing(times, num_steps, "graph" if device.type == "cuda" else "clock")


def _event_times(function: Callable[[], object], rounds: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    for begin, end in zip(events[::2], events[1::2], strict=True):
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(events[::2], events[1::2], strict=True)]


def _timing(times: list[float], num_calls: int, method: str) -> Timing:
    median = statistics.median(times)
    return Timing(median / num_calls, (max(times) - min(times)) / median, method)


def measure_peaks(device: torch.device, smoke: bool) -> Peaks:
    """Measures the device's peaks: read and copy on buffers far larger than any cache, products of random matrices.

    Products of zeros would take less power and run at higher clocks.
    """
    size = (1 << 18) if smoke else (1 << 29)
    read, copy = _bandwidths(torch.rand(size, device=device))
    rates = {}
    for dtype in GEMM_DTYPES:
        seconds = []
        for size in (64,) if smoke else (4096, 8192):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds.append(call_seconds(lambda _, a=a, b=b: a @ b, [0], device).seconds / (2.0 * size**3))
        rates[dtype_name(dtype)] = 1e-9 / min(seconds)
    return Peaks(read, copy, rates)


def _bandwidths(source: Tensor) -> tuple[float, float]:
    """Measures read and copy in GB/s; a copy counts the bytes read and the bytes written."""
    target = torch.empty_like(source)
    read = min(call_seconds(lambda _, f=f: f(), [0], source.device).seconds for f in (source.sum, source.amax))
    copy = call_seconds(lambda _: target.copy_(source), [0], source.device).seconds
    return source.nbytes / read / 1e9, 2 * source.nbytes / copy / 1e9
