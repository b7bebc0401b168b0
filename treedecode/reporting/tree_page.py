"""The record of a search as one self-contained HTML page: no request leaves it, and it works from a file."""

import json
import math
import re
from html import escape
from importlib.resources import files
from typing import Any

from treedecode.accounting.meter import Spending
from treedecode.decoding.search_tree import SearchTree

_PLACE = re.compile(r"\{\{(\w+)\}\}")
# What could end the script element that holds the data, or is a line break to JavaScript; JSON takes the escapes.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def tree_page(
    tree: SearchTree, *, title: str = "Search tree", answer: str | None = None, spending: Spending | None = None
) -> str:
    """A page that draws a search: every step once, however many branches share it.

    The page zooms, pans, searches and folds, with mouse, touch and keyboard; a step shows its text, score, tokens and
    log-probability, what became of it by colour, shape and words, and the path of the answer stands out.

    Args:
        title: of the page, for instance the problem's id.
        answer: what the search came to.
        spending: what it cost; shown in the head.

    Returns:
        HTML; texts of the tree are data in it, never markup.
    """
    data = {"nodes": strict(tree.to_json()["nodes"]), "answer": answer, "spending": _shown(spending)}
    parts = {
        "title": escape(title),
        "tree": json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_ESCAPES),
        "style": _part("page.css"),
        "script": '"use strict";\n(() => {\n' + _part("layout.js") + "\n" + _part("view.js") + "})();",
    }
    return _PLACE.sub(lambda place: parts[place[1]], _part("page.html"))


def strict(value: Any) -> Any:
    """JSON that every parser takes: infinite and undefined numbers, a likelihood of 0 for one, become null."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _part(name: str) -> str:
    return (files("treedecode") / "data" / "tree_page" / name).read_text(encoding="utf-8")


def _shown(spending: Spending | None) -> list[tuple[str, str]]:
    if spending is None:
        return []
    apart = f"{spending.branch_forwards:,} one branch at a time"
    copied = f"{in_bytes(spending.kv_bytes_copied)} with copied caches"
    return [
        ("forwards", f"{spending.forwards:,} ({apart})"),
        ("KV read", f"{in_bytes(spending.kv_bytes)} ({copied})"),
    ]


def in_bytes(count: float) -> str:
    """A number of bytes as one reads it: `1.5 GB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
