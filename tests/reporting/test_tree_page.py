"""The page of a search as a document: what is in it, and what an untrusted text cannot do to it."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from support.search_trees import HOSTILE, QUESTION, sampled, searched

from treedecode.accounting.meter import Spending
from treedecode.decoding.search_tree import SearchTree
from treedecode.reporting.tree_page import in_bytes, solution_page, strict, tree_page
from treedecode.search.solutions import Solution
from treedecode.tasks import Problem


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


def solution(problem, tree):
    return Solution(problem, "80", "", 0.5, False, True, Spending(forwards=40), 1.0, tree)


@pytest.mark.parametrize(
    ("problem", "question"),
    [
        (Problem("train-1", f"Question: {QUESTION}\nAnswer:"), QUESTION),
        (Problem("train-1", f"{QUESTION}\n"), QUESTION),
        (Problem("train-1", f"{QUESTION}\nThink first.\n", data={"question": QUESTION}), QUESTION),
        (Problem("train-1", HOSTILE), HOSTILE),
    ],
)
def test_the_question_of_a_solution_is_its_title_and_its_first_node(problem, question):
    page = solution_page(solution(problem, sampled(2)))
    data = json.loads(Elements(page).scripts[0])
    assert data["question"] == question
    assert data["answer"] == "80"
    assert data["spending"][0][0] == "forwards"
    titles = [unescape(re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]) for tag in ("title", "h1")]
    assert titles == [" ".join(question.split()), f"{question} <small>train-1</small>"]
    assert len(Elements(page).scripts) == 2


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
