"""Plots of a study, from its JSON alone: accuracy against compute, latency against compute, coverage."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from treedecode.common.arrays import FloatArray
from treedecode.study.labels import Label, Obstacles, place_labels

Json = dict[str, Any]

# Okabe and Ito's colours, which colour-blind people tell apart; markers differ too, for print without colour.
COLORS = {"self_consistency": "#0072B2", "best_of_n": "#D55E00", "dynamic_allocation": "#009E73"}
MARKERS = {"self_consistency": "o", "best_of_n": "s", "dynamic_allocation": "D"}
FURTHER = (("#E69F00", "v"), ("#56B4E9", "P"), ("#CC79A7", "X"))  # of curves without a name of their own
NAMES = {
    "self_consistency": "Self-consistency",
    "best_of_n": "Best of n",
    "dynamic_allocation": "Dynamic allocation",
}
GREY, DARK = "#6b6b6b", "#333333"
OURS, COPIED = "#882255", "#999999"  # a search as it is, and with its branches one after another
WIDTH, HEIGHT = 7.2, 4.6  # inches
_GROWTH, _MAX_GROWTHS = 1.35, 10  # of the height, until all labels have room
_LABEL_SIZE = 7.5
_LINE_LENGTH = 30  # characters
_RADIUS = 3.4  # of a marker with its edge, points
STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": DARK,
    "ytick.labelcolor": DARK,
    "axes.labelcolor": DARK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.grid": True,
    "grid.color": "#ebebeb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "treedecode",  # the same study gives the same file
}


@dataclass
class Annotations:
    """The labels of a plot, and what they keep off."""

    labels: list[Label] = field(default_factory=list)
    markers: list[tuple[float, float]] = field(default_factory=list)
    lines: list[FloatArray] = field(default_factory=list)
    areas: list[FloatArray] = field(default_factory=list)


def draw(study: Json, out: Path) -> list[Path]:
    """Writes every plot the study has data for, as PNG and SVG.

    A study that is finished is drawn anew by `draw(json.loads((out / "study.json").read_text()), out)`.

    Returns:
        the files, PNG before SVG.
    """
    written = []
    for name, figure in figures(study):
        for ending in ("png", "svg"):
            path = out / f"{name}.{ending}"
            metadata = {"Date": None} if ending == "svg" else None
            with mpl.rc_context(STYLE):
                figure.savefig(path, dpi=200, metadata=metadata)
            written.append(path)
    return written


def figures(study: Json) -> Iterator[tuple[str, Figure]]:
    """Makes the plots that a study has data for: (name, figure).

    A figure becomes taller until all of its labels have room.
    """
    for name, plot in (("accuracy", accuracy), ("latency", latency), ("coverage", coverage)):
        for growth in range(_MAX_GROWTHS):
            with mpl.rc_context(STYLE):
                size = (WIDTH, HEIGHT * _GROWTH**growth)
                figure = Figure(size, dpi=200, layout="constrained")  # no pyplot: no window, no global state
                axes = figure.subplots()
                annotations = plot(study, axes)
                if annotations is None:
                    break
                if _annotate(figure, axes, annotations) or growth == _MAX_GROWTHS - 1:
                    yield name, figure
                    break


def accuracy(study: Json, axes: Axes) -> Annotations | None:
    """Draws accuracy against compute: curves with the law that predicts best, and every other row as a point."""
    curves = {name: laws for name, laws in study["laws"].items() if name != "coverage"}
    rows = [row for row in _measured(study) if not row["curve"] and row["strategy"] not in curves]
    if not curves and not rows:
        return None
    annotations, further = Annotations(), iter(FURTHER * len(curves))
    for name, laws in curves.items():
        color, marker = (COLORS[name], MARKERS[name]) if name in COLORS else next(further)
        _curve(axes, annotations, laws["points"], color, marker)
        best = _best_law(laws)
        if best is not None:
            line = laws["fits"][best]["line"]
            _line(axes, annotations, line, color)
            axes.fill_between(line["costs"], line["low"], line["high"], color=color, alpha=0.12, linewidth=0)
            band = np.r_[np.c_[line["costs"], line["low"]], np.c_[line["costs"], line["high"]][::-1]]
            annotations.areas.append(band)
        text = NAMES.get(name, name) + ("" if best is None else f": {best} law")
        annotations.labels.append(Label(text, _from_the_end(laws["points"]), color))
    for row, name in zip(rows, _names(rows), strict=True):
        point = {"cost": row["tokens_x"], "accuracy": row["accuracy"], "accuracy_ci": row["accuracy_ci"]}
        _curve(axes, annotations, [point], GREY, "o")
        annotations.labels.append(Label(name, ((row["tokens_x"], row["accuracy"]),), DARK))
    axes.set(xlabel="Generated tokens, in multiples of one chain", ylabel="Accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _compute_axis(axes)
    handles: list[Any] = [axes.errorbar([], [], [], fmt="o", color=GREY, markersize=4.5, elinewidth=0.8)]
    texts = ["measured, with 95% interval"]
    if any(_best_law(laws) for laws in curves.values()):
        handles.append((Patch(color=GREY, alpha=0.2, linewidth=0), Line2D([], [], color=GREY, linewidth=1.3)))
        texts.append("law that predicts best, with 95% band")
    _legend(axes, handles, texts)
    return annotations


def latency(study: Json, axes: Axes) -> Annotations | None:
    """Draws latency of one problem against compute: ours, and the same work one branch after another."""
    rows = [row for row in _measured(study) if row["latency_s"]]
    if not rows:
        return None
    annotations = Annotations()
    for row, name in zip(rows, _names(rows), strict=True):
        cost, ours, unshared = row["tokens_x"], row["latency_s"], row["one_after_another"]
        pair = ((cost, ours), (cost, unshared["latency_s"])) if unshared else ((cost, ours),)
        axes.plot(*np.array(pair).T, color="#d4d4d4", linewidth=0.8, zorder=1)
        annotations.labels.append(Label(name, pair[:1], DARK, siblings=pair[1:]))
        annotations.lines.append(np.array(pair))
        annotations.markers += pair
    both = [row for row in rows if row["one_after_another"]]
    [copied] = axes.plot(
        [row["tokens_x"] for row in both],
        [row["one_after_another"]["latency_s"] for row in both],
        "s",
        color=COPIED,
        markerfacecolor="white",
        markersize=5,
    )
    [ours] = axes.plot(
        [row["tokens_x"] for row in rows], [row["latency_s"] for row in rows], "o", color=OURS, markersize=5
    )
    axes.set(xlabel="Generated tokens, in multiples of one chain", ylabel="Seconds for one problem (median)")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(plain)
    axes.grid(True, axis="y", which="minor")
    _compute_axis(axes)
    _legend(
        axes,
        [ours, *([copied] if both else [])],
        ["treedecode", "the same work one branch after another, caches copied"],
    )
    return annotations


def coverage(study: Json, axes: Axes) -> Annotations | None:
    """Draws pass@k of the pool of chains, with its fits, above the majority of as many chains."""
    laws = study["laws"].get("coverage")
    if laws is None:
        return None
    annotations, handles, texts = Annotations(), [], []
    _curve(axes, annotations, laws["points"], DARK, "o")
    for law, name, style in (("coverage", "power law", "-"), ("beta-binomial", "Beta-binomial", "--")):
        line = laws["fits"][law].get("line")
        if line is not None:
            handles.append(_line(axes, annotations, line, DARK, style))
            texts.append(f"pass@k: {name}")
    annotations.labels.append(Label("At least one right (pass@k)", _from_the_end(laws["points"]), DARK))
    majority = study["laws"].get("self_consistency")
    if majority is not None:
        counts = [point["cost"] for point in laws["points"]]
        points = [{**point, "cost": count} for point, count in zip(majority["points"], counts, strict=True)]
        color = COLORS["self_consistency"]
        _curve(axes, annotations, points, color, MARKERS["self_consistency"])
        annotations.labels.append(Label("Majority right", _from_the_end(points), color))
    axes.set(xlabel="Chains", ylabel="Share of problems")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _compute_axis(axes)
    _legend(axes, handles, texts)
    return annotations


def _measured(study: Json) -> list[Json]:
    """Returns the rows of strategies that have a value on the axis of compute. A pool of chains is no strategy."""
    rows = [row for row in study["rows"] if row["error"] is None and row["tokens_x"]]
    return [row for row in rows if row["strategy"] != "chain_pool"]


def _curve(axes: Axes, annotations: Annotations, points: Sequence[Json], color: str, marker: str) -> None:
    """Draws points with the intervals of their accuracies."""
    costs = [point["cost"] for point in points]
    values = np.array([point["accuracy"] for point in points])
    ends = np.array([point["accuracy_ci"] for point in points])
    errors = ((ends - values[:, None]) * [-1, 1]).clip(min=0).T
    axes.errorbar(costs, values, errors, fmt=marker, color=color, ecolor=(color, 0.6), markersize=5, elinewidth=0.9)
    annotations.markers += list(zip(costs, values.tolist(), strict=True))
    annotations.lines += [np.array([[cost, low], [cost, high]]) for cost, (low, high) in zip(costs, ends, strict=True)]


def _line(axes: Axes, annotations: Annotations, line: Json, color: str, style: str = "-") -> Line2D:
    """Draws a fitted law."""
    annotations.lines.append(np.array([line["costs"], line["accuracy"]]).T)
    [artist] = axes.plot(line["costs"], line["accuracy"], style, color=color, linewidth=1.3)
    return artist


def _best_law(laws: Json) -> str | None:
    """Returns the law that predicts best; where that cannot be told, the first that could be fitted."""
    held_out = laws["held_out"]
    order = [each["law"] for each in held_out] if isinstance(held_out, list) else list(laws["fits"])
    return next((name for name in order if "line" in laws["fits"][name]), None)


def _from_the_end(points: Sequence[Json]) -> tuple[tuple[float, float], ...]:
    """Returns the points of a curve, the last one first, because curves are farthest apart there."""
    return tuple((point["cost"], point["accuracy"]) for point in reversed(points))


def _names(rows: Sequence[Json]) -> list[str]:
    """Returns the rows' labels, without the parentheses at their end where the rest is unique.

    Parentheses that are needed go into a second line.
    """
    short = [re.sub(r" \(.*\)$", "", row["label"]) for row in rows]
    names = []
    for row, name in zip(rows, short, strict=True):
        lines = [name] if short.count(name) == 1 else re.split(r" (?=\(.*\)$)", row["label"])
        names.append("\n".join(textwrap.fill(line, _LINE_LENGTH) for line in lines))
    return names


def _compute_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, handles: list[Any], texts: list[str]) -> None:
    """Puts a legend above the axes, where no point is."""
    if handles:
        axes.legend(
            handles,
            texts[: len(handles)],
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=len(handles),
            borderaxespad=0.2,
            borderpad=0,
            handletextpad=0.5,
            columnspacing=1.6,
            labelcolor=DARK,
        )


def _annotate(figure: Figure, axes: Axes, annotations: Annotations) -> bool:
    """Places the labels of a plot, whose layout is final from here on.

    Returns:
        True if all of them have room.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    obstacles = Obstacles(annotations.markers, _RADIUS, annotations.lines, annotations.areas)
    return place_labels(axes, annotations.labels, obstacles, size=_LABEL_SIZE)
