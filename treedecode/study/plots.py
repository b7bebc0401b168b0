"""Plots of a study, from its JSON alone: accuracy against compute, latency against compute, coverage."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

Json = dict[str, Any]

# Okabe and Ito's colours, which colour-blind people tell apart; marks differ too, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
GREY = "#666666"
NAMES = {
    "self_consistency": "Self-consistency",
    "best_of_n": "Best of n",
    "dynamic_allocation": "Dynamic allocation",
}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "treedecode",  # the same study gives the same file
}


def draw(study: Json, out: Path) -> list[Path]:
    """Writes every plot the study has data for, as PNG and SVG.

    Returns:
        the files, PNG before SVG.
    """
    written = []
    for name, plot in (("accuracy", accuracy), ("latency", latency), ("coverage", coverage)):
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(7.2, 4.2), layout="constrained")  # no pyplot: no window, no global state
            if not plot(study, figure.subplots()):
                continue
            for ending in ("png", "svg"):
                path = out / f"{name}.{ending}"
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(path, dpi=200, metadata=metadata)
                written.append(path)
    return written


def accuracy(study: Json, axes: Axes) -> bool:
    """Accuracy against compute: curves with the law that predicts best, and every other row as a point."""
    curves = {name: laws for name, laws in study["laws"].items() if name != "coverage"}
    for i, (name, laws) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        _points(axes, laws["points"], colour, MARKS[i % len(MARKS)], NAMES.get(name, name))
        best = _best(laws)
        if best is not None:
            line = laws["fits"][best]["line"]
            axes.plot(
                line["costs"],
                line["accuracy"],
                color=colour,
                linewidth=1.2,
                label=f"{NAMES.get(name, name)}: {best} law",
            )
            axes.fill_between(line["costs"], line["low"], line["high"], color=colour, alpha=0.13, linewidth=0)
    rest = [row for row in study["rows"] if row["error"] is None and row["tokens_x"] and not row["curve"]]
    rest = [row for row in rest if row["strategy"] not in {"chain_pool", *curves}]
    for row in rest:
        low, high = row["accuracy_ci"]
        errors = [[max(row["accuracy"] - low, 0.0)], [max(high - row["accuracy"], 0.0)]]
        axes.errorbar(row["tokens_x"], row["accuracy"], errors, fmt="o", color=GREY, markersize=4, elinewidth=0.8)
    _number(axes, rest, [row["accuracy"] for row in rest])
    axes.set(xlabel="Generated tokens, in multiples of one chain", ylabel="Accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _compute_axis(axes)
    if curves:
        axes.legend(loc="best", fontsize=8)
    return bool(curves or rest)


def latency(study: Json, axes: Axes) -> bool:
    """Latency of one problem against compute: ours, and the same work one branch after another."""
    rows = [row for row in study["rows"] if row["error"] is None and row["tokens_x"] and row["latency_s"]]
    rows = [row for row in rows if row["strategy"] != "chain_pool"]
    apart = [row for row in rows if row["one_after_another"]]
    for row in apart:
        ends = [row["latency_s"], row["one_after_another"]["latency_s"]]
        axes.plot([row["tokens_x"]] * 2, ends, color="#cccccc", linewidth=0.8, zorder=1)
    axes.plot(
        [row["tokens_x"] for row in apart],
        [row["one_after_another"]["latency_s"] for row in apart],
        MARKS[1],
        color=COLOURS[1],
        label="One branch after another, caches copied",
    )
    axes.plot(
        [row["tokens_x"] for row in rows],
        [row["latency_s"] for row in rows],
        MARKS[0],
        color=COLOURS[0],
        label="treedecode",
    )
    _number(axes, rows, [row["latency_s"] for row in rows])
    axes.set(xlabel="Generated tokens, in multiples of one chain", ylabel="Seconds for one problem (median)")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(plain)
    _compute_axis(axes)
    axes.legend(loc="best", fontsize=8)
    return bool(rows)


def coverage(study: Json, axes: Axes) -> bool:
    """pass@k of the pool of chains, with its fits, above the majority of as many chains."""
    found = study["laws"].get("coverage")
    if found is None:
        return False
    _points(axes, found["points"], COLOURS[0], MARKS[0], "At least one right (pass@k)")
    names = {"coverage": "power law", "beta-binomial": "Beta-binomial"}
    for (law, name), style in zip(names.items(), ("-", "--"), strict=True):
        line = found["fits"][law].get("line")
        if line is not None:
            axes.plot(line["costs"], line["accuracy"], style, color=COLOURS[0], linewidth=1.2, label=f"pass@k: {name}")
    majority = study["laws"].get("self_consistency")
    if majority is not None:
        counts = [point["cost"] for point in found["points"]]
        same = [{**point, "cost": count} for point, count in zip(majority["points"], counts, strict=True)]
        _points(axes, same, COLOURS[1], MARKS[1], "Majority right")
    axes.set(xlabel="Chains", ylabel="Problems")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _compute_axis(axes)
    axes.legend(loc="best", fontsize=8)
    return True


def _points(axes: Axes, points: list[Json], colour: str, mark: str, label: str) -> None:
    values = [point["accuracy"] for point in points]
    ends = [
        [max(v - p["accuracy_ci"][0], 0.0) for v, p in zip(values, points, strict=True)],
        [max(p["accuracy_ci"][1] - v, 0.0) for v, p in zip(values, points, strict=True)],
    ]
    axes.errorbar(
        [point["cost"] for point in points],
        values,
        ends,
        fmt=mark,
        color=colour,
        markersize=5,
        elinewidth=0.8,
        label=label,
    )


def _best(laws: Json) -> str | None:
    """The law that predicts best; where that cannot be told, the first that could be fitted."""
    held = laws["held_out"]
    order = [one["law"] for one in held] if isinstance(held, list) else list(laws["fits"])
    return next((name for name in order if "line" in laws["fits"][name]), None)


def _number(axes: Axes, rows: list[Json], heights: list[float]) -> None:
    """Numbers at the rows' points, and beside the axes what they stand for: labels of a dozen rows would overlap."""
    for i, (row, height) in enumerate(zip(rows, heights, strict=True), 1):
        at = (row["tokens_x"], height)
        axes.annotate(str(i), at, xytext=(4, 3), textcoords="offset points", fontsize=7, color="#444444")
    key = "\n".join(f"{i}  {row['label']}" for i, row in enumerate(rows, 1))
    axes.annotate(key, (1.02, 1), xycoords="axes fraction", va="top", fontsize=7, color="#444444", linespacing=1.6)


def _compute_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
