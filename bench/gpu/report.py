"""Writes a folder's results as one JSON file and as Markdown tables: `python -m bench.gpu.report --out DIR`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.report import duration, peaks_line

PARTS = ("attention", "select", "pages", "decode")


def machine(results: dict[str, Any]) -> str:
    """Writes the device, the versions of the software and the clocks as a sentence or two."""
    environment = results["environment"]
    named = {
        "driver": environment.get("driver"),
        "torch": environment["torch"],
        "CUDA": environment["cuda"],
        **{name: environment.get(name) for name in ("triton", "transformers", "flashinfer-python", "flash-attn")},
        "commit": environment["commit"],
    }
    versions = ", ".join(f"{name} {value}" for name, value in named.items() if value)
    clocks = ""
    if "sm_clock_mhz" in environment:
        clocks = (
            f" Clocks as found: {environment['sm_clock_mhz']} of {environment['sm_clock_max_mhz']} MHz, memory "
            f"{environment['memory_clock_mhz']} MHz."
        )
    return f"{environment['device']}: {versions}.{clocks}"


def _spread(timing: dict[str, Any]) -> str:
    mark = "" if timing["method"] == "graph" else f", {timing['method']}"
    return f"{duration(timing['seconds'])} (±{50 * timing['spread']:.0f}%{mark})"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    yield "| case | floor | what | warm | cold | % of copy | TFLOP/s | plan, a layer's share | over ours | notes |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in results["rows"]:
        times = [_time(entry) for entry in row["entries"] if entry["ours"] and _time(entry)]
        best = min(times, default=None)
        for number, entry in enumerate(row["entries"]):
            case, floor = (row["case"], duration(row["floor_seconds"])) if number == 0 else ("", "")
            yield f"| {case} | {floor} | {entry['name']} | {' | '.join(_cells(entry, best))} |"


def _time(entry: dict[str, Any]) -> float | None:
    timing = entry.get("cold") or entry.get("warm")
    return timing["seconds"] if timing else None


def _cells(entry: dict[str, Any], best: float | None) -> Iterator[str]:
    if "warm" not in entry:
        yield from ("", "", "", "", "", "", entry["skipped"])
        return
    warm, cold = entry["warm"], entry.get("cold")
    shown = cold or warm
    yield _spread(warm)
    yield _spread(cold) if cold else ""
    yield f"{shown['copy_percent']:.0f}%" if "copy_percent" in shown else ""
    yield f"{shown['tflops']:.0f}" if shown.get("tflops") else ""
    yield duration(entry["plan"]["seconds_per_layer"]) if "plan" in entry else ""
    yield f"{shown['seconds'] / best:.2f}x" if best and not entry["ours"] else ""
    extra = [entry[name] for name in ("notes", "not_captured", "skipped") if entry.get(name)]
    extra += [f"{entry['over_one_branch']:.2f}x one branch"] if "over_one_branch" in entry else []
    extra += [f"{entry['speedup']:.1f}x faster"] if "speedup" in entry else []
    yield "; ".join(extra).replace("|", "/")


def markdown(results_by_part: dict[str, dict[str, Any]], sanitizer: str | None) -> str:
    """Makes a table per part; times are medians of a call, ± half the distance of the extremes."""
    lines = ["# Results on a GPU", ""]
    for part, results in results_by_part.items():
        lines += [f"## {part}", "", machine(results), "", peaks_line(results["peaks"]), "", *_lines(results), ""]
        if results["not_reached"]:
            lines += [f"Not reached in the time given: {'; '.join(results['not_reached'])}.", ""]
    if sanitizer is not None:
        lines += ["## compute-sanitizer", "", "```", sanitizer.strip(), "```", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="bench/results/local/gpu", help="folder of the results")
    folder = Path(parser.parse_args(argv).out)
    paths = {part: folder / f"{part}.json" for part in PARTS}
    results = {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}
    summary = folder / "sanitizer.txt"
    text = markdown(results, summary.read_text() if summary.exists() else None)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(text)
    print(text)
    return int(not results)


if __name__ == "__main__":
    sys.exit(main())
