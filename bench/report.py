"""Prints benchmark results as a Markdown table: `python -m bench.report results.json …`."""

import json
import sys
from collections.abc import Iterable
from typing import Any


def duration(seconds: float) -> str:
    """Writes a duration with three digits, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def peaks_line(peaks: dict[str, Any]) -> str:
    """Writes the machine's peaks as a sentence."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in peaks["gemm_gflops"].items())
    return (
        f"Machine peaks in this run: read {peaks['read_gbs']:.1f} GB/s, copy {peaks['copy_gbs']:.1f} GB/s, "
        f"GEMM {rates} GFLOP/s."
    )


def table(benchmarks: Iterable[dict[str, Any]], peaks: dict[str, Any] | None = None) -> str:
    """Makes a Markdown table, a row per benchmark: median, share of the roofline, and peers as median and ratio."""
    lines = [peaks_line(peaks), ""] if peaks else []
    lines += ["| benchmark | time | roofline | % of roofline | peers (median, ratio) |", "|---|---|---|---|---|"]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "median_seconds" not in info:
            continue
        peers = "; ".join(
            f"{name} {duration(peer['median_seconds'])}, {peer['ratio']:.2f}x" for name, peer in info["peers"].items()
        )
        lines.append(
            f"| {benchmark['name'].removeprefix('bench_')} | {duration(info['median_seconds'])} "
            f"| {duration(info['roofline_seconds'])} | {info['roofline_percent']:.0f}% | {peers} |"
        )
    return "\n".join(lines)


def main() -> None:
    for path in sys.argv[1:]:
        with open(path) as file:
            results = json.load(file)
        print(table(results["benchmarks"], results.get("peaks")))


if __name__ == "__main__":
    main()
