"""Times an op beside its peers, and against the best that this machine can do.

The roofline time of an op is the time any implementation needs here: the bytes it must move at the measured memory
bandwidth, or the arithmetic it must do at the measured GEMM rate of its dtype, whichever takes longer.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[[], object]
GEMM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BUFFER_BYTES = 256 << 20  # well above any last-level cache


@dataclass(frozen=True)
class Peaks:
    """The machine's measured peaks: bandwidths in GB/s (10^9 bytes), GEMM rates in GFLOP/s by dtype name."""

    read_gbs: float
    copy_gbs: float  # bytes read plus bytes written
    gemm_gflops: dict[str, float]

    def roofline_seconds(self, num_bytes: float, num_flops: float, dtype: torch.dtype) -> float:
        """Returns the least time for moving `num_bytes` and computing `num_flops` in `dtype`.

        A dtype that GEMM only emulates is bounded by fp32, to which it can be converted.
        """
        rate = max(self.gemm_gflops[dtype_name(dtype)], self.gemm_gflops["float32"])
        return max(num_bytes / (max(self.read_gbs, self.copy_gbs) * 1e9), num_flops / (rate * 1e9))


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def seconds(function: Function) -> float:
    """Times one call by the wall clock."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def best_seconds(function: Function, rounds: int = 7) -> float:
    """Returns the shortest of several calls, after one to warm up."""
    function()
    return min(seconds(function) for _ in range(rounds))


@functools.cache
def measure_peaks() -> Peaks:
    """Measures the peaks, once per process (some seconds), as the best of three passes, which other load disturbs."""
    source = torch.ones(_BUFFER_BYTES // 4)
    target = torch.empty_like(source)
    read, copy, rates = 0.0, 0.0, dict.fromkeys(map(dtype_name, GEMM_DTYPES), 0.0)
    for _ in range(3):
        for function in (source.sum, source.max, lambda: torch.dot(source, source)):
            read = max(read, _BUFFER_BYTES / best_seconds(function, rounds=3) / 1e9)
        copy = max(copy, 2 * _BUFFER_BYTES / best_seconds(lambda: target.copy_(source), rounds=3) / 1e9)
        for dtype in GEMM_DTYPES:
            rates[dtype_name(dtype)] = max(rates[dtype_name(dtype)], _gemm_gflops(dtype))
    return Peaks(read, copy, rates)


def _gemm_gflops(dtype: torch.dtype) -> float:
    rate = 0.0
    for size in (512, 2048):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        duration = best_seconds(lambda a=a, b=b: a.mm(b), rounds=3)
        rate = max(rate, 2.0 * size**3 / duration / 1e9)
        if duration > 0.01:  # emulated: a larger product would take minutes and tell no more
            break
    return rate


def compare(
    benchmark: Any,
    ours: Function,
    peers: Mapping[str, Function],
    *,
    num_bytes: float,
    num_flops: float = 0.0,
    dtype: torch.dtype = torch.float32,
    rounds: int | None = None,
    peer_seconds: float = 10.0,
    prepare: Function = lambda: None,
    **notes: object,
) -> dict[str, float]:
    """Times `ours` and its peers in rounds, each once a round, so that noise hits all of them alike.

    pytest-benchmark's statistics receive our times, its `extra_info` everything.

    Args:
        benchmark: pytest-benchmark's fixture.
        ours: a call of treedecode.
        peers: functions that do the same work without treedecode, by name.
        num_bytes, num_flops: bytes and operations that any implementation must move and do (see the module).
        dtype: its GEMM rate bounds the arithmetic.
        rounds: by default as many as take `ours` about a second, between 5 and 50.
        peer_seconds: a slow peer takes part in the first rounds only, for about this long in all, but at least once.
        prepare: called before each call, untimed.
        notes: further values to keep beside the result.

    Returns:
        the speed-up over each peer, its median over ours; empty when timing is switched off.
    """

    def timed(function: Function) -> float:
        prepare()
        return seconds(function)

    first = {name: timed(function) for name, function in {"treedecode": ours, **peers}.items()}  # also the warm-up
    rounds = rounds or max(5, min(50, round(1.0 / first["treedecode"])))
    rounds_left = {name: max(1, min(rounds, round(peer_seconds / first[name]))) for name in peers}
    times: dict[str, list[float]] = {name: [] for name in peers}

    def warm(name: str, function: Function) -> None:
        if first[name] < 5e-3:  # the one before left cold caches and sleeping threads, which a decode loop does not
            timed(function)

    def run_peers() -> None:
        for name, function in peers.items():
            if rounds_left[name] > 0:
                rounds_left[name] -= 1
                warm(name, function)
                times[name].append(timed(function))
        warm("treedecode", ours)
        prepare()

    benchmark.pedantic(ours, setup=run_peers, rounds=rounds)
    if benchmark.disabled:
        return {}
    peaks = measure_peaks()
    median = benchmark.stats.stats.median
    roofline = peaks.roofline_seconds(num_bytes, num_flops, dtype)
    results = {
        name: {
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "ratio": statistics.median(values) / median,
        }
        for name, values in times.items()
    }
    benchmark.extra_info.update(
        bytes=num_bytes,
        flops=num_flops,
        dtype=dtype_name(dtype),
        median_seconds=median,
        min_seconds=benchmark.stats.stats.min,
        roofline_seconds=roofline,
        roofline_percent=100 * roofline / median,
        peers=results,
        **notes,
    )
    return {name: result["ratio"] for name, result in results.items()}
