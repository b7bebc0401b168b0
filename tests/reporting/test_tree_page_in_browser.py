"""The page of a search in a browser: what it draws, how it is read on a laptop, and how one moves about in it."""

import base64
import itertools
import math
import re

import pytest
from support.chromium import EXECUTABLE, Browser
from support.search_trees import HOSTILE, QUESTION, deep, large, sampled, searched

from treedecode.decoding.search_tree import SearchTree
from treedecode.reporting.tree_page import tree_page

SIX_DIGITS = 1e-5  # are what CSS keeps of a number


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if EXECUTABLE is None:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a tree's page from a file; at the end nothing may have gone wrong or been asked for."""

    def open_page(tree, **options):
        path = tmp_path / "page.html"
        path.write_text(tree_page(tree, **options), encoding="utf-8")
        browser.open(path)
        return browser

    yield open_page
    assert browser.problems == []
    assert browser.requests == [(tmp_path / "page.html").as_uri()]


@pytest.fixture
def resize(browser):
    """Gives the window's inside a size."""

    def resize(width, height):
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    yield resize
    browser.call("Emulation.clearDeviceMetricsOverride")


def boxes(page, selector):
    """`(left, top, right, bottom)` of elements, in pixels of the window."""
    return page.run(
        f"[...document.querySelectorAll('{selector}')].map(element => element.getBoundingClientRect())"
        ".map(box => [box.left, box.top, box.right, box.bottom])"
    )


def text_sizes(page):
    """Heights of the letters that cards show, in pixels of the window."""
    return page.run(
        "(() => { const zoom = Number(document.getElementById('world').style.transform.match(/scale\\(([0-9.]+)/)[1]);"
        "return [...document.querySelectorAll('.node, .node *, .fold')].filter(element => element.textContent)"
        ".map(element => zoom * parseFloat(getComputedStyle(element).fontSize)); })()"
    )


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def classes(browser, node):
    return browser.run(f"document.getElementById('node-{node}').className").split()


def test_every_step_is_drawn_once(show):
    tree = searched()
    page = show(tree, title="problem <7>", answer="15")
    assert page.run("document.title") == "problem <7>"
    assert page.run("document.querySelectorAll('.node').length") == len(tree.nodes)
    assert page.run("document.querySelectorAll('path.edge').length") == len(tree.nodes) - 1 + 1  # and the legend's
    on_path = page.run("[...document.querySelectorAll('.node.on-path')].map(node => Number(node.dataset.node))")
    assert sorted(on_path) == tree.path(5)
    assert {"pruned"} <= set(classes(page, 1))
    assert {"merged"} <= set(classes(page, 2))
    shapes = page.run("[1, 2, 3, 5, 6].map(i => document.querySelector(`#node-${i} svg path`).getAttribute('d'))")
    assert len(set(shapes)) == 5
    # 7 + 3 * 6 + 1 + 2 * 5 tokens; branches 13, 13, 19, 19 tokens long
    assert "4 branches · 6 steps · 36 tokens held once, 64 in branches kept apart" in page.run(
        "document.getElementById('summary').textContent"
    )


def test_the_first_node_is_the_question_and_its_panel_has_the_prompt(show):
    tree = sampled(3)
    page = show(tree, title="train-1", question=f" {QUESTION}\n")
    assert page.run("document.title") == QUESTION
    assert page.run("document.querySelector('h1').textContent") == f"{QUESTION} train-1"
    assert page.run("document.querySelector('#node-0 .text').textContent") == QUESTION
    page.click("#node-0")
    assert page.run("[...document.querySelectorAll('#panel pre')].map(pre => pre.textContent)") == [
        QUESTION,
        tree.nodes[0].text,
    ]


def test_without_a_question_the_first_node_is_the_prompt(show):
    page = show(searched(), title="problem 7")
    assert page.run("document.querySelector('h1').textContent") == "problem 7"
    assert page.run("document.querySelector('#node-0 .text').textContent") == "Use 3 5 to make 15"


# A laptop's screen, and what a browser leaves of it.
@pytest.mark.parametrize("size", [(1366, 768), (1366, 650), (1440, 900), (1440, 780)])
def test_sixteen_branches_are_readable_on_a_laptop(show, resize, size):
    resize(*size)
    page = show(sampled(16), question=QUESTION, answer="80")
    assert min(text_sizes(page)) >= 12
    cards, [stage] = boxes(page, ".node"), boxes(page, "#stage")
    assert len(cards) == 17
    for card in cards:
        assert stage[0] <= card[0] < card[2] <= stage[2]
        assert stage[1] <= card[1] < card[3] <= stage[3]
    shown = page.run("[...document.querySelectorAll('.node .text')].map(text => text.clientWidth)")
    assert min(shown[1:]) > 600  # a branch is one line, which is most of the window


@pytest.mark.parametrize(
    "make", [lambda: sampled(16), lambda: deep(3, 5, 2), lambda: deep(6, 4, 3), lambda: large(300)]
)
def test_cards_never_overlap(show, resize, make):
    resize(1366, 650)
    tree = make()
    page = show(tree, question=QUESTION)
    assert min(text_sizes(page)) >= 12
    page.click("#fit")
    cards = page.run(  # as they are at zoom 1; smaller ones are drawn smaller still
        "[...document.querySelectorAll('.node')].map(card => card.style).map(style => ["
        "style.left, style.top, style.width, style.height].map(parseFloat)).map("
        "([left, top, width, height]) => [left, top, left + width, top + height])"
    )
    assert len(cards) == len(tree.nodes)
    assert not any(overlap(one, other) for one, other in itertools.combinations(cards, 2))
    parts = [boxes(page, selector)[0] for selector in ("header", "#stage", "#legend")]
    assert not any(overlap(one, other) for one, other in itertools.combinations(parts, 2))


def test_a_deep_search_begins_at_its_question(show, resize):
    resize(1366, 768)
    page = show(deep(4, 5, 3), question=QUESTION)
    [card], [stage] = boxes(page, "#node-0"), boxes(page, "#stage")
    assert stage[0] <= card[0]
    assert stage[1] <= card[1]
    assert card[3] <= stage[3]
    statuses = page.run("document.getElementById('statuses').innerText").split("\n")
    assert statuses == ["prompt", "1", "continued", "9", "left open", "2", "pruned", "38", "the answer", "1"]


def test_edges_are_as_wide_as_branches_are_many(show):
    page = show(searched())
    width = "[...document.querySelectorAll('#edges path')].map(path => parseFloat(path.style.strokeWidth))"
    assert sorted(page.run(width)) == pytest.approx([2, 2, 2, 2, 1 + 2**0.5, 1 + 2**0.5], rel=SIX_DIGITS)


def test_a_click_shows_the_details(show):
    page = show(searched())
    assert page.run("document.getElementById('panel').hidden")
    page.click("#node-5")
    panel = page.run("document.getElementById('panel').innerText")
    assert "Step 5 · the answer" in panel
    facts = page.run(
        "Object.fromEntries([...document.querySelectorAll('#panel dt')]"
        ".map(name => [name.textContent, name.nextSibling.textContent]))"
    )
    assert facts["score"] == "0.875"
    assert facts["tokens"] == "5"
    assert facts["log-probability"] == "-0.500 nats"
    assert facts["tokens from the beginning"] == "19"
    assert page.run("document.querySelector('#panel pre').textContent") == "3 * 5 = 15\n"
    assert page.run("[...document.querySelectorAll('#panel pre')].at(-1).textContent") == "3 + 2 = 5\nWait3 * 5 = 15\n"
    page.press("Escape")
    assert page.run("document.getElementById('panel').hidden")


def test_hostile_texts_in_the_browser(show):
    tree = SearchTree()
    tree.add(-1, "prompt", HOSTILE, 3)
    page = show(tree, title="fine", answer=HOSTILE)
    page.click("#node-0")
    assert page.run("document.title") == "fine"
    assert page.run("document.querySelector('#panel pre').textContent") == HOSTILE
    assert page.run("document.querySelectorAll('.node').length") == 1


def test_hostile_questions_in_the_browser(show):
    tree = SearchTree()
    tree.add(-1, "prompt", f"An example\n{HOSTILE}\n", 3)
    page = show(tree, title=HOSTILE, question=HOSTILE)
    page.click("#node-0")
    assert page.run("document.title") == " ".join(HOSTILE.split())
    assert page.run("document.querySelector('h1').textContent") == f"{HOSTILE} {HOSTILE}"
    assert page.run("document.querySelector('#panel pre').textContent") == HOSTILE
    assert page.run("document.querySelectorAll('script').length") == 2


def test_the_keyboard_moves_folds_and_finds(show):
    page = show(searched())
    page.run("document.getElementById('stage').focus()")
    chosen = "document.getElementById('stage').getAttribute('aria-activedescendant')"
    for key, node in (("a", 5), ("ArrowLeft", 4), ("ArrowLeft", 3), ("ArrowUp", 2), ("Home", 0), ("ArrowRight", 2)):
        page.press(key)
        assert page.run(chosen) == f"node-{node}"
    assert page.run("document.getElementById('node-2').getAttribute('aria-selected')") == "true"
    page.press("ArrowDown")
    page.press(" ")
    assert page.run("document.getElementById('node-3').getAttribute('aria-expanded')") == "false"
    assert page.run("document.querySelectorAll('.node').length") == 4
    page.press("/")
    page.call("Input.insertText", text="5 - 3")
    page.settle()
    assert page.run("document.getElementById('matches').textContent") == "1 match"
    page.press("Enter")  # unfolds what hides it
    assert page.run("document.querySelector('.node.selected').dataset.node") == "6"
    label = page.run("document.getElementById('node-6').getAttribute('aria-label')")
    assert label == "complete, 5 - 3 = 2, 5 tokens, 1 branch"


def test_wheel_and_drag(show):
    page = show(searched())
    numbers = "document.getElementById('world').style.transform.match(/-?[0-9.]+/g).map(Number)"
    x, y, zoom = page.run(numbers)
    page.mouse("mouseWheel", 400, 300, deltaX=0, deltaY=-240)
    page.settle()
    x1, y1, zoom1 = page.run(numbers)
    exact = zoom * math.exp(240 * 0.0016)
    assert zoom1 == pytest.approx(exact, rel=SIX_DIGITS)
    header = page.run("document.getElementById('stage').getBoundingClientRect().top")
    # what is under the pointer stays there; pixels, of some hundreds
    assert (400 - x1) / exact == pytest.approx((400 - x) / zoom, abs=1e-3)
    assert (300 - header - y1) / exact == pytest.approx((300 - header - y) / zoom, abs=1e-3)
    page.mouse("mousePressed", 30, 120, button="left", clickCount=1)
    page.mouse("mouseMoved", 80, 150, button="left", buttons=1)
    page.mouse("mouseReleased", 80, 150, button="left", clickCount=1)
    page.settle()
    assert page.run(numbers) == pytest.approx([x1 + 50, y1 + 30, zoom1], abs=1e-3)
    assert page.run("document.getElementById('panel').hidden")


def test_pinch(show):
    page = show(searched())
    numbers = "document.getElementById('world').style.transform.match(/-?[0-9.]+/g).map(Number)"
    zoom = page.run(numbers)[2]
    for kind, gap in (("touchStart", 50), ("touchMove", 75), ("touchMove", 100), ("touchEnd", None)):
        points = [] if gap is None else [{"x": 600 - gap, "y": 400, "id": 0}, {"x": 600 + gap, "y": 400, "id": 1}]
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.settle()
    assert page.run(numbers)[2] == pytest.approx(2 * zoom, rel=0.02)


def test_a_large_tree_is_folded_and_can_be_unfolded(show):
    tree = large(5000)
    page = show(tree)
    assert page.run("document.querySelectorAll('.node').length") < 500
    page.press("0")
    page.run("document.getElementById('unfold').click()")
    page.run("document.getElementById('fit').click()")
    page.settle()
    assert page.run("document.querySelectorAll('.node').length") == 5000
    page.run("document.getElementById('stage').focus()")
    page.press("a")
    assert page.run("document.querySelector('.node.selected').dataset.node") == "2500"


def test_dark_where_the_reader_wants_it(show):
    page = show(searched())
    ground = "getComputedStyle(document.body).backgroundColor"
    grounds = []
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        grounds.append([int(value) for value in re.findall(r"\d+", page.run(ground))[:3]])
    page.call("Emulation.setEmulatedMedia", features=[])
    assert min(grounds[0]) > 200
    assert max(grounds[1]) < 60
    assert base64.b64decode(page.screenshot()).startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [0, 1])
def test_the_smallest_trees(show, count):
    tree = SearchTree()
    for _ in range(count):
        tree.add(-1, "prompt", "alone", 1)
    page = show(tree)
    page.run("document.getElementById('stage').focus()")
    for key in ("ArrowRight", "0", "a", "Escape"):
        page.press(key)
    assert page.run("document.querySelectorAll('.node').length") == count
