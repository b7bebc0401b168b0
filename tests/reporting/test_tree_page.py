import base64
import json
import math
import re
from html.parser import HTMLParser

import pytest
from support.chromium import EXECUTABLE, Browser

from treedecode.accounting.meter import Spending
from treedecode.decoding.search_tree import SearchTree
from treedecode.reporting.tree_page import in_bytes, strict, tree_page

HOSTILE = "</script><script>document.title = 'taken'</script><!-- <b>\"quotes\" & 'more' \u2028 \\ {{style}} {{title}}"
SIX_DIGITS = 1e-5  # are what CSS keeps of a number


def searched():
    """Two steps of three branches each: one pruned, one merged, one come to the answer."""
    tree = SearchTree()
    root = tree.add(-1, "prompt", "Use 3 5 to make 15\n", 7)
    first, second, third = (tree.add(root, "generated", f"3 + {i} = {3 + i}\n", 6, -1.5) for i in range(3))
    tree.nodes[first].score, tree.nodes[first].status = 0.25, "pruned"
    tree.nodes[second].status = "merged"
    given = tree.add(third, "given", "Wait", 1)
    last, other = (tree.add(given, "generated", text, 5, -0.5) for text in ("3 * 5 = 15\n", "5 - 3 = 2\n"))
    tree.nodes[last].score, tree.nodes[last].status = 0.875, "answer"
    tree.nodes[other].status = "final"
    return tree


def large(count):
    tree = SearchTree()
    tree.add(-1, "prompt", "prompt", 3)
    for i in range(1, count):
        tree.add((i - 1) // 3 if i % 5 else i - 1, "generated", f"step {i}\n", 2, -1.0)
    tree.nodes[count // 2].status = "answer"
    return tree


class Elements(HTMLParser):
    """Scripts and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.attributes, self._script = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append("")
            self._script = True

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._script = None


def test_texts_are_data_whatever_they_hold():
    tree = SearchTree()
    tree.add(-1, "prompt", HOSTILE, 3)
    page = tree_page(tree, title=HOSTILE, answer=HOSTILE)
    elements = Elements(page)
    assert len(elements.scripts) == 2
    data = json.loads(elements.scripts[0])
    assert data["nodes"][0]["text"] == data["answer"] == HOSTILE
    assert "taken" not in elements.scripts[1]


def test_nothing_is_fetched():
    elements = Elements(tree_page(searched()))
    sources = [value for _, name, value in elements.attributes if name in ("src", "href")]
    assert sources == ["data:,"]
    policy = next(value for _, name, value in elements.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none';")
    assert "url(" not in tree_page(searched())


def test_numbers_json_does_not_know_become_null():
    tree = searched()
    tree.nodes[1].score, tree.nodes[2].logprob = -float("inf"), float("nan")
    data = json.loads(Elements(tree_page(tree)).scripts[0], parse_constant=pytest.fail)
    assert data["nodes"][1]["score"] is None
    assert data["nodes"][2]["logprob"] is None
    assert strict({"a": [1.5, float("inf")], "b": True}) == {"a": [1.5, None], "b": True}


def test_spending_is_shown_beside_what_it_would_have_been():
    spending = Spending(forwards=40, branch_forwards=1610, kv_bytes=3_200_000, kv_bytes_copied=41_000_000)
    data = json.loads(Elements(tree_page(searched(), spending=spending)).scripts[0])
    assert data["spending"] == [
        ["forwards", "40 (1,610 one branch at a time)"],
        ["KV read", "3.2 MB (41 MB with copied caches)"],
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (1.5e9, "1.5 GB"), (2e16, "2e+04 TB")],
)
def test_bytes(count, text):
    assert in_bytes(count) == text


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
