"""Places labels beside points of a plot, so that none covers a point, another label or the edge of the axes.

Every label has a fixed set of candidate boxes around its points. A label takes the candidate of the lowest cost, given
those of all others, until no label changes its place; the best of several orders counts. The result is a function of
the plot alone: nothing is drawn at random. All lengths are in typographic points, so that it holds at every resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.path import Path

from treedecode.common.arrays import FloatArray

Point = tuple[float, float]  # in data coordinates

_GAPS = (3.0, 7.0, 12.0, 18.0, 25.0, 33.0, 43.0, 55.0, 70.0, 90.0, 115.0, 145.0, 185.0, 240.0)  # point to label
_NUM_DIRECTIONS = 24
_LINE_SPACING = 1.1
_PADDING = 1.5  # around a label's text
_LEADER_FROM = 8.0  # a label farther away than this is joined to its point by a line
_MAX_SWEEPS = 15

# costs, in the unit of a point's length of leader
_FORBIDDEN = 1e5
_LATER_POINT = 4.0  # of the next of a label's points
_OVER_LINE = (25.0, 1.5)  # of a line under a label, and per length
_IN_AREA = 12.0
_NEAR_OTHERS, _AS_NEAR = 10.0, 2.0  # of another's point that is nearer, or as near
_LEADER_OVER_LINE = 8.0
_LEADER_OVER_MARKER = 60.0
_LEADER_OVER_LABEL = 150.0
_LEADERS_CROSS = 90.0


@dataclass(frozen=True)
class Label:
    """A text to be placed.

    Attributes:
        points: it stands beside one of these, rather beside the first.
        siblings: further points of what it names; it may be as near to them.
    """

    text: str
    points: tuple[Point, ...]
    color: str
    siblings: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Obstacles:
    """The parts of a plot that labels keep off, in data coordinates.

    Attributes:
        markers: points that no label may cover.
        marker_radius: in typographic points.
        lines: polylines, each `[n, 2]`, that labels had better not cover.
        areas: polygons, each `[n, 2]`, that labels had better not stand in.
    """

    markers: Sequence[Point]
    marker_radius: float
    lines: Sequence[FloatArray] = ()
    areas: Sequence[FloatArray] = ()


@dataclass(frozen=True)
class _Scene:
    """`Obstacles` in typographic points.

    Attributes:
        window: `[4]` left, bottom, right, top of the axes.
        markers: `[n, 2]`.
        segments: `[m, 4]` of all lines; the segments of a line begin at one of `begins`.
        areas: polygons, each `[n, 2]`.
    """

    window: FloatArray
    markers: FloatArray
    marker_radius: float
    segments: FloatArray
    begins: np.ndarray
    areas: Sequence[FloatArray]

    @classmethod
    def of(cls, axes: Axes, obstacles: Obstacles) -> "_Scene":
        paths = [_to_points(axes, np.asarray(line)) for line in obstacles.lines if len(line) > 1]
        return cls(
            window=np.array(axes.get_window_extent().extents) * (72 / axes.figure.dpi),
            markers=_to_points(axes, np.reshape(obstacles.markers, (-1, 2))),
            marker_radius=obstacles.marker_radius,
            segments=np.concatenate([np.zeros((0, 4)), *(np.hstack([path[:-1], path[1:]]) for path in paths)]),
            begins=np.cumsum([0, *(len(path) - 1 for path in paths)])[:-1],
            areas=[_to_points(axes, np.asarray(area)) for area in obstacles.areas],
        )


@dataclass(frozen=True)
class _Candidates:
    """Boxes that one label may take.

    Attributes:
        boxes: `[k, 4]` left, bottom, right, top; with padding.
        leaders: `[k, 4]` from the rim of the marker to the box.
        offsets: `[k, 2]` of the lower left corner of the text from its point.
        points: `[k]` index of the point.
        costs: `[k]`, without those of other labels.
    """

    boxes: FloatArray
    leaders: FloatArray
    offsets: FloatArray
    points: np.ndarray
    costs: FloatArray

    def only(self, i: int) -> "_Candidates":
        """Returns the `i`-th alone."""
        row = slice(i, i + 1)
        return _Candidates(self.boxes[row], self.leaders[row], self.offsets[row], self.points[row], self.costs[row])


def place_labels(axes: Axes, labels: Sequence[Label], obstacles: Obstacles, *, size: float) -> bool:
    """Adds labels to a plot whose limits and layout are final.

    Args:
        size: of the font.

    Returns:
        True if no label covers a marker or another label.
    """
    if not labels:
        return True
    scene = _Scene.of(axes, obstacles)
    candidates = [_candidates_of(axes, label, scene, size) for label in labels]
    if not all(len(each.costs) for each in candidates):
        return False  # a label is larger than the axes
    chosen, cost = _assign(candidates)
    for label, candidate in zip(labels, chosen, strict=True):
        _draw(axes, label, candidate, obstacles.marker_radius, size)
    return cost < _FORBIDDEN


def _draw(axes: Axes, label: Label, candidate: _Candidates, radius: float, size: float) -> None:
    [(left, bottom, right, top)], [(x0, y0, x1, y1)] = candidate.boxes, candidate.leaders
    point = label.points[candidate.points[0]]
    [(x, _)] = _to_points(axes, np.array([point]))
    leader = {
        "arrowstyle": "-",
        "color": "#999999",
        "linewidth": 0.6,
        "patchA": None,
        "relpos": ((x1 - left) / (right - left), (y1 - bottom) / (top - bottom)),
        "shrinkA": 0,
        "shrinkB": radius,
    }
    text = axes.annotate(
        label.text,
        point,
        xytext=candidate.offsets[0],
        textcoords="offset points",
        arrowprops=leader if np.hypot(x1 - x0, y1 - y0) > _LEADER_FROM else None,
        ha="left",
        va="bottom",
        multialignment="right" if right < x else "left" if left > x else "center",
        fontsize=size,
        color=label.color,
        linespacing=_LINE_SPACING,
        zorder=6,
    )
    text.set_in_layout(False)


# -- candidates --


def _candidates_of(axes: Axes, label: Label, scene: _Scene, size: float) -> _Candidates:
    width, height = _text_size(axes, label.text, size)
    angles = np.arange(_NUM_DIRECTIONS) * (2 * np.pi / _NUM_DIRECTIONS)
    unit = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    half = unit / np.abs(unit).max(axis=1, keepdims=True) * [width / 2, height / 2]  # from the near side to the middle
    gaps = np.array(_GAPS)[:, None, None]
    middles = (unit * (gaps + scene.marker_radius) + half).reshape(-1, 2)
    own = _to_points(axes, np.array(label.points + label.siblings))
    index = np.repeat(np.arange(len(label.points)), len(middles))
    points = own[index]
    offsets = np.tile(middles - [width / 2, height / 2], (len(label.points), 1))
    corners, extent = points + offsets, np.array([width, height])
    boxes = np.concatenate([corners - _PADDING, corners + extent + _PADDING], axis=1)
    ends = np.clip(points, boxes[:, :2], boxes[:, 2:])
    distances = np.hypot(*(ends - points).T)
    shares = scene.marker_radius / np.maximum(distances, scene.marker_radius)
    leaders = np.concatenate([points + (ends - points) * shares[:, None], ends], axis=1)

    inside = np.all(boxes[:, :2] >= scene.window[:2], axis=1) & np.all(boxes[:, 2:] <= scene.window[2:], axis=1)
    boxes, leaders, offsets, index = boxes[inside], leaders[inside], offsets[inside], index[inside]
    lengths = np.hypot(*(leaders[:, 2:] - leaders[:, :2]).T)
    costs = lengths + _LATER_POINT * index + _costs_of_obstacles(boxes, leaders, own, scene)
    # of equal places: right of the point, then above
    sides = np.sign((boxes[:, :2] + boxes[:, 2:]) / 2 - own[index])
    return _Candidates(boxes, leaders, offsets, index, costs - sides @ [0.02, 0.01])


def _costs_of_obstacles(boxes: FloatArray, leaders: FloatArray, own: FloatArray, scene: _Scene) -> FloatArray:
    """`[k]` costs of a label's candidates by what is in the plot; `own` are the points it names, `[n, 2]`."""
    radius = scene.marker_radius
    costs = _FORBIDDEN * _overlaps(boxes, _around(scene.markers, radius)).sum(axis=1)
    is_own = (np.abs(scene.markers[:, None] - own).max(axis=2) < 0.5).any(axis=1)
    others = scene.markers[~is_own]
    costs += _LEADER_OVER_MARKER * (_lengths_within(leaders, _around(others, radius)) > 0).sum(axis=1)
    lengths = np.hypot(*(leaders[:, 2:] - leaders[:, :2]).T)
    is_nearer = _distances(boxes, others) - radius < lengths[:, None] + _AS_NEAR
    costs += _NEAR_OTHERS * np.where(lengths > _LEADER_FROM, 1, 2) * is_nearer.sum(axis=1).clip(max=3)
    if len(scene.segments):
        covered = np.add.reduceat(_lengths_within(scene.segments, boxes), scene.begins, axis=0)
        costs += ((covered > 0) * _OVER_LINE[0] + covered * _OVER_LINE[1]).sum(axis=0)
        costs += _LEADER_OVER_LINE * _crossings(leaders, scene.segments).sum(axis=1)
    for area in scene.areas:
        costs += _IN_AREA * _shares_within(boxes, area)
    return costs


def _text_size(axes: Axes, text: str, size: float) -> Point:
    """(width, height) of a text."""
    artist = axes.text(0, 0, text, fontsize=size, linespacing=_LINE_SPACING)
    extent = artist.get_window_extent()
    artist.remove()
    return extent.width * 72 / axes.figure.dpi, extent.height * 72 / axes.figure.dpi


def _to_points(axes: Axes, data: FloatArray) -> FloatArray:
    """Data coordinates `[n, 2]` -> typographic points from the figure's lower left corner."""
    return cast(FloatArray, axes.transData.transform(data)) * (72 / axes.figure.dpi)


# -- assignment --


def _assign(candidates: Sequence[_Candidates]) -> tuple[list[_Candidates], float]:
    """Returns the candidate that each label takes, and what all of them cost."""
    ends = np.cumsum([len(each.costs) for each in candidates])
    slices = [slice(end - len(each.costs), end) for end, each in zip(ends, candidates, strict=True)]
    names = [attribute.name for attribute in fields(_Candidates)]
    every = _Candidates(*(np.concatenate([getattr(each, name) for each in candidates]) for name in names))
    heights = np.array([each.boxes[:, [1, 3]].mean() for each in candidates])
    given, downwards = np.arange(len(candidates)), np.argsort(-heights, kind="stable")
    results = [_descend(every, slices, order) for order in (given, given[::-1], downwards, downwards[::-1])]
    taken, cost = min(results, key=lambda result: result[1])
    return [every.only(i) for i in taken], cost


def _descend(every: _Candidates, slices: Sequence[slice], order: np.ndarray) -> tuple[list[int], float]:
    """Lets one label after another take its best candidate, until none changes its own.

    Args:
        every: the candidates of all labels.
        slices: those of each label.
    """
    taken = np.full(len(slices), -1)
    costs_beside = np.zeros((len(slices), len(every.costs)))  # of every candidate, by what each label has taken
    total = every.costs.copy()
    for _ in range(_MAX_SWEEPS):
        before = taken.copy()
        for i in order.tolist():
            own = slices[i]
            best = own.start + int((total[own] - costs_beside[i, own]).argmin())
            if best != taken[i]:
                taken[i] = best
                total -= costs_beside[i]
                costs_beside[i] = _costs_beside(every, every.only(best))
                total += costs_beside[i]
        if (taken == before).all():
            break
    pairs = costs_beside[:, taken]
    cost = every.costs[taken].sum() + np.triu(pairs, 1).sum()
    return taken.tolist(), float(cost)


def _costs_beside(candidates: _Candidates, other: _Candidates) -> FloatArray:
    """`[k]` costs of candidates beside one that another label has taken."""
    return (
        _FORBIDDEN * _overlaps(candidates.boxes, other.boxes)
        + _LEADER_OVER_LABEL * (_lengths_within(candidates.leaders, other.boxes) > 0)
        + _LEADER_OVER_LABEL * (_lengths_within(other.leaders, candidates.boxes) > 0).T
        + _LEADERS_CROSS * _crossings(candidates.leaders, other.leaders)
    )[:, 0]


# -- geometry --


def _around(points: FloatArray, radius: float) -> FloatArray:
    """`[n, 4]` boxes around points `[n, 2]`."""
    return np.concatenate([points - radius, points + radius], axis=1)


def _distances(boxes: FloatArray, points: FloatArray) -> FloatArray:
    """`[k, n]` distances of boxes `[k, 4]` from points `[n, 2]`."""
    apart = np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:]).clip(min=0)
    return np.hypot(apart[..., 0], apart[..., 1])


def _overlaps(boxes: FloatArray, others: FloatArray) -> np.ndarray:
    """`[k, n]` bool: which boxes `[k, 4]` overlap which others `[n, 4]`."""
    a, b = boxes[:, None], others[None]
    return np.all(a[..., :2] < b[..., 2:], axis=-1) & np.all(b[..., :2] < a[..., 2:], axis=-1)


def _lengths_within(segments: FloatArray, boxes: FloatArray) -> FloatArray:
    """`[k, n]` lengths of the parts of segments `[k, 4]` that lie in boxes `[n, 4]` (Liang and Barsky, 1984)."""
    begin, step = segments[:, None, :2], segments[:, None, 2:] - segments[:, None, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        entry, leave = (boxes[None, :, :2] - begin) / step, (boxes[None, :, 2:] - begin) / step
    entry, leave = np.minimum(entry, leave), np.maximum(entry, leave)
    # a segment parallel to an axis is within both sides, or within neither
    parallel = step == 0
    within = (begin > boxes[None, :, :2]) & (begin < boxes[None, :, 2:])
    entry = np.where(parallel, np.where(within, -np.inf, np.inf), entry).max(axis=-1).clip(min=0)
    leave = np.where(parallel, np.where(within, np.inf, -np.inf), leave).min(axis=-1).clip(max=1)
    return (leave - entry).clip(min=0) * np.hypot(*(segments[:, 2:] - segments[:, :2]).T)[:, None]


def _crossings(segments: FloatArray, others: FloatArray) -> np.ndarray:
    """`[k, n]` bool: which segments `[k, 4]` cross which others `[n, 4]`."""
    a, b = segments[:, None], others[None]

    def side(line: FloatArray, point: FloatArray) -> FloatArray:
        along, to = line[..., 2:] - line[..., :2], point - line[..., :2]
        return cast(FloatArray, along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])

    others_part = side(a, b[..., :2]) * side(a, b[..., 2:]) < 0
    return np.asarray(others_part & (side(b, a[..., :2]) * side(b, a[..., 2:]) < 0))


def _shares_within(boxes: FloatArray, polygon: FloatArray) -> FloatArray:
    """`[k]` shares of boxes within a polygon `[n, 2]`, by 5 x 3 points of each."""
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 3)), axis=-1).reshape(-1, 2)
    samples = boxes[:, None, :2] + grid * (boxes[:, None, 2:] - boxes[:, None, :2])
    return Path(polygon).contains_points(samples.reshape(-1, 2)).reshape(len(boxes), -1).mean(axis=1)
