"""Draws the record of a search as one HTML page that opens from a file and fetches nothing."""

import json
import math
import re
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from treedecode.accounting.meter import Spending
from treedecode.decoding.search_tree import SearchTree

if TYPE_CHECKING:
    from treedecode.search.solutions import Solution

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Characters that could end the script element that holds the data, or break a line in JavaScript; JSON has escapes.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def tree_page(
    tree: SearchTree,
    *,
    title: str = "Search tree",
    question: str | None = None,
    answer: str | None = None,
    spending: Spending | None = None,
) -> str:
    """Draws a search as a page, every step once, however many branches share it.

    The page zooms, pans, searches and folds, with mouse, touch and keyboard. A step shows its text and score, and its
    status by colour, shape and words; the path of the answer stands out. At first the text is readable, and the whole
    tree is shown where it fits.

    Args:
        title: of the page; beside a question it stands small, for instance as the problem's id.
        question: the problem, as the page's heading and on the first node. Without one the heading is the title, and
            the first node shows the prompt, worked examples included.
        answer: the answer that the search took.
        spending: the cost of the search, shown in the head.

    Returns:
        HTML. Texts of the tree are data in it, never markup.
    """
    if question is not None:
        question = question.strip()
    data = {
        "nodes": strict(tree.to_json()["nodes"]),
        "question": question,
        "answer": answer,
        "spending": _spending_lines(spending),
    }
    heading = escape(title) if question is None else f"{escape(question)} <small>{escape(title)}</small>"
    parts = {
        "title": escape(title if question is None else " ".join(question.split())),
        "heading": heading,
        "tree": json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_ESCAPES),
        "style": _file("page.css"),
        "script": '"use strict";\n(() => {\n' + _file("layout.js") + "\n" + _file("view.js") + "})();",
    }
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], _file("page.html"))


def solution_page(solution: "Solution") -> str:
    """Draws the search for a problem: `tree_page` of a `Solution` of `solve`, with the problem's question."""
    return tree_page(
        solution.tree,
        title=solution.problem.id,
        question=_question(solution),
        answer=solution.answer,
        spending=solution.spending,
    )


def _question(solution: "Solution") -> str:
    """Returns the question as the task keeps it, else the prompt without the labels "Question:" and "Answer:"."""
    problem = solution.problem
    question = problem.data.get("question")
    if isinstance(question, str):
        return question
    labelled = re.fullmatch(r"\s*Question:(.*?)(Answer:)?\s*", problem.prompt, re.DOTALL)
    return labelled[1] if labelled else problem.prompt


def strict(value: Any) -> Any:
    """Replaces infinite and undefined numbers by None, so that the JSON of a value is one that every parser takes."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file(name: str) -> str:
    return (files("treedecode") / "data" / "tree_page" / name).read_text(encoding="utf-8")


def _spending_lines(spending: Spending | None) -> list[tuple[str, str]]:
    if spending is None:
        return []
    unbatched = f"{spending.branch_forwards:,} one branch at a time"
    copied = f"{in_bytes(spending.kv_bytes_copied)} with copied caches"
    return [
        ("forwards", f"{spending.forwards:,} ({unbatched})"),
        ("KV read", f"{in_bytes(spending.kv_bytes)} ({copied})"),
    ]


def in_bytes(count: float) -> str:
    """Writes a number of bytes in decimal units: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
