"""Plots of a study: labels keep off points, one another and the legend, and stand where what they name is."""

import json
import math
import re
from io import StringIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.backends.backend_svg import RendererSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.paths import ROOT

from treedecode.study import plots
from treedecode.study.labels import Label, Obstacles, place_labels

RECORDED = json.loads((ROOT / "bench" / "results" / "study" / "study.json").read_text())
RADIUS = 2.5  # of a marker without its edge, points
GRID = [(2.0**i, 0.2 + 0.15 * j) for i in range(6) for j in range(5)]
CROWDS = {
    "one point": [(4.0, 0.5)] * 24,
    "a column": [(8.0, 0.3 + 0.012 * i) for i in range(24)],
    "a grid": GRID,
    "the right edge": [(1.0, 0.1)] + [(32.0, 0.9 - 0.001 * i) for i in range(20)],
    "the corners": [(x, y) for x in (1.0, 64.0) for y in (0.0, 1.0)] * 4,
    "a diagonal": [(2.0 ** (i / 5), i / 25) for i in range(25)],
}


def row(i, cost, accuracy):
    slow = {"latency_s": 0.05 * cost * (1 + accuracy)}
    return {
        "label": f"Strategy number {i} (of several settings)" if i % 3 else f"Strategy (setting {i})",
        "strategy": "some",
        "curve": None,
        "error": None,
        "tokens_x": cost,
        "accuracy": accuracy,
        "accuracy_ci": [max(accuracy - 0.05, 0), min(accuracy + 0.05, 1)],
        "latency_s": 0.05 + accuracy / 20,
        "one_after_another": slow if i % 2 else None,
    }


def study_of(points, laws=None):
    rows = [row(i, cost, accuracy) for i, (cost, accuracy) in enumerate(points)]
    return {"rows": rows, "laws": laws or {}}


def figures(study):
    return dict(plots.figures(study))


def renderer_of(figure, ending):
    """Draws a figure as a file with that ending has it; returns what measures its texts."""
    figure.set_dpi({"png": 200, "svg": 72}[ending])
    width, height = figure.bbox.size
    renderer = RendererAgg(width, height, figure.dpi) if ending == "png" else RendererSVG(width, height, StringIO())
    figure.draw(renderer)
    return renderer


def pixels(box):
    """A box's (left, bottom, right, top) without the slack of rounding to pixels."""
    left, bottom, right, top = box.extents
    return left + 0.5, bottom + 0.5, right - 0.5, top - 0.5


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_box(text, renderer):
    """The box of an annotation's text, without its leader."""
    return pixels(Text.get_window_extent(text, renderer))


def marker_boxes(figure, axes):
    radius = RADIUS * figure.dpi / 72
    points = [line.get_xydata() for line in axes.lines if line.get_marker() not in ("None", "", None)]
    for x, y in axes.transData.transform(np.concatenate([each for each in points if len(each)])):
        yield x - radius, y - radius, x + radius, y + radius


def check(figure, ending):
    """Asserts that what is drawn keeps off each other."""
    renderer = renderer_of(figure, ending)
    [axes] = figure.axes
    boxes = [text_box(text, renderer) for text in axes.texts]
    legend = pixels(axes.get_legend().get_window_extent(renderer)) if axes.get_legend() else None
    inside, page = axes.get_window_extent().extents, figure.bbox.extents
    markers = list(marker_boxes(figure, axes))
    assert boxes
    for i, (text, box) in enumerate(zip(axes.texts, boxes, strict=True)):
        assert inside[0] <= box[0] <= box[2] <= inside[2], text.get_text()
        assert inside[1] <= box[1] <= box[3] <= inside[3], text.get_text()
        assert not any(overlap(box, other) for other in boxes[:i]), text.get_text()
        assert not any(overlap(box, marker) for marker in markers), text.get_text()
        assert legend is None or not overlap(box, legend), text.get_text()
    if legend is not None:
        assert page[0] <= legend[0] < legend[2] <= page[2]
        assert page[1] <= legend[1] < legend[3] <= page[3]
        assert not any(overlap(legend, marker) for marker in markers)


@pytest.fixture(scope="module")
def recorded():
    return figures(RECORDED)


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("name", ["accuracy", "latency", "coverage"])
def test_labels_of_the_recorded_study_cover_nothing(recorded, name, ending):
    check(recorded[name], ending)


@pytest.mark.parametrize("points", CROWDS.values(), ids=CROWDS.keys())
def test_labels_of_a_crowd_cover_nothing(points):
    drawn = figures(study_of(points, RECORDED["laws"]))
    assert set(drawn) == {"accuracy", "latency", "coverage"}
    for name in ("accuracy", "latency"):
        assert len(drawn[name].axes[0].texts) >= len(points)
        check(drawn[name], "png")


@pytest.mark.parametrize("name", ["accuracy", "latency"])
def test_strategies_are_named_where_they_stand(recorded, name):
    """A label is near its point, or a leader ends there."""
    figure, renderer = recorded[name], renderer_of(recorded[name], "png")
    [axes] = figure.axes
    named = {re.split(": \\w+ law|\n", text.get_text())[0] for text in axes.texts}
    labels = {row["label"].partition(" (")[0] for row in RECORDED["rows"] if row["strategy"] != "chain_pool"}
    assert named == (labels if name == "latency" else labels - {"Best of 8"} | {"Best of n"})
    for text in axes.texts:
        x, y = axes.transData.transform(text.xy)
        left, bottom, right, top = text_box(text, renderer)
        distance = math.hypot(max(left - x, x - right, 0), max(bottom - y, y - top, 0)) * 72 / figure.dpi
        if text.arrow_patch is None:
            assert distance < 14
        else:
            end = text.arrow_patch.get_transform().transform_path(text.arrow_patch.get_path()).vertices[-1]
            assert math.dist(end, (x, y)) * 72 / figure.dpi == pytest.approx(plots._RADIUS, abs=0.5)


def test_what_is_in_parentheses_is_said_where_names_alone_do_not_tell():
    rows = [{"label": label} for label in ("REBASE (16)", "Votes (8 chains)", "Votes (32 chains)", "One chain")]
    assert plots._names(rows) == ["REBASE", "Votes\n(8 chains)", "Votes\n(32 chains)", "One chain"]
    [long] = plots._names([{"label": "word " * 12}])
    assert max(map(len, long.split("\n"))) <= 30


def test_a_figure_grows_until_its_labels_have_room(monkeypatch):
    monkeypatch.setattr(plots, "HEIGHT", 1.5)
    (_, few), (_, many) = (next(plots.figures(study_of(points))) for points in (GRID[:3], [(4.0, 0.5)] * 24))
    assert few.get_figheight() == 1.5
    assert many.get_figheight() > 1.5
    check(many, "png")


def test_nothing_is_drawn_of_a_study_without_rows():
    failed = {**row(0, 1.0, 0.5), "error": "no luck"}
    assert figures({"rows": [failed], "laws": {}}) == {}


def axes_of(width=4.0, height=3.0):
    figure = Figure((width, height), dpi=100)
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return axes


def test_a_label_stands_beside_its_point_off_lines_and_areas():
    axes = axes_of()
    point = (0.5, 0.5)
    right_half = np.array([[0.5, -1], [2, -1], [2, 2], [0.5, 2]])
    slanted = np.array([[0.0, 0.55], [1.0, 0.55]])
    assert place_labels(axes, [Label("here", (point,), "k")], Obstacles([point], 3, [slanted], [right_half]), size=8)
    [text] = axes.texts
    x, y = axes.transData.transform(point)
    box = text.get_window_extent()
    assert box.x1 <= x, "it is out of the area on the right"
    assert box.y1 <= axes.transData.transform((0, 0.55))[1], "and below the line"
    assert math.hypot(x - box.x1, max(box.y0 - y, y - box.y1, 0)) < 15


def test_a_label_that_no_place_is_large_enough_for_is_refused():
    axes = axes_of(0.6, 0.6)
    assert not place_labels(axes, [Label("far too long a name", ((0.5, 0.5),), "k")], Obstacles([], 3), size=8)
    assert len(axes.texts) == 0
    assert place_labels(axes, [], Obstacles([], 3), size=8)
