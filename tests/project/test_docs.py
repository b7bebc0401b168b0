"""The documentation: lines fit, links and paths lead somewhere, and decisions have one form."""

import re
from pathlib import Path

import pytest
from support.paths import ROOT

MAX_COLUMNS = 100
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
DECISIONS = sorted({*ROOT.glob("docs/decisions/*.md")} - {ROOT / "docs/decisions/README.md"})
NO_FILES = {"bench/results/local/gpu", "treedecode/generate.py"}  # made by a script; one that a record argues against
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def wide_lines(text: str) -> list[str]:
    """Lines over `MAX_COLUMNS` that could be shorter: tables, code blocks and links without prose cannot."""
    lines = FENCE.sub("", text).splitlines()
    return [
        line for line in lines if len(line) > MAX_COLUMNS and not re.match(r"\||!?\[[^\]]*\]\([^)]*\)$|https?://", line)
    ]


def links(text: str) -> list[str]:
    """Targets of links within the repository, without their anchors."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", text))
    return [target for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_fit(page):
    assert wide_lines(page.read_text()) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_links_lead_somewhere(page):
    assert [target for target in links(page.read_text()) if not (page.parent / target).exists()] == []


def paths(text: str) -> set[str]:
    """Paths in the repository that a text names in backquotes, without patterns such as `tests/<room>/`."""
    named = re.findall(r"`((?:\w+)/[\w./]+)`", text)
    return {path for path in named if (ROOT / path.split("/")[0]).is_dir()}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name)
def test_paths_exist(page):
    assert [path for path in paths(page.read_text()) - NO_FILES if not (ROOT / path).exists()] == []


def test_the_walk_sees_wide_lines_links_and_paths():
    assert paths("`tests/a.py` `tests/<room>/` `csrc/b/` `int/float` bench/c.py") == {"tests/a.py", "csrc/b/"}
    wide = "x" * (MAX_COLUMNS + 1)
    text = f"{wide}\n| {wide} |\n```\n{wide}\n```\nhttps://{wide}\n[a](b) {wide}"
    assert wide_lines(text) == [wide, f"[a](b) {wide}"]
    assert links("[a](b.md#c) ![d](e.svg) [f](https://g) `h`") == ["b.md", "e.svg"]


def decisions(page: Path) -> dict[int, tuple[str, str, str]]:
    """The records of a page by number: title, date, text."""
    records = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
    heads = [re.match(r"D-(\d{3}) (.+)\n\n(\d{4}-\d\d-\d\d)(?:, revised \d{4}-\d\d-\d\d)?\n\n", one) for one in records]
    assert all(heads), f"{name(page)}: expected `## D-<number> <title>` and a date"
    return {int(head[1]): (head[2], head[3], one) for head, one in zip(heads, records, strict=True)}


@pytest.mark.parametrize("page", DECISIONS, ids=name)
def test_decisions_have_context_decision_and_price(page):
    for number, (_, _, text) in decisions(page).items():
        parts = re.findall(r"^\*\*(Context|Decision|Price)\.\*\* *\S?", text, re.MULTILINE)
        assert parts == ["Context", "Decision", "Price"], f"D-{number:03}"


def test_decisions_are_numbered_by_date_and_listed_in_the_index():
    rows = re.findall(
        r"^\| \[D-(\d{3})\]\((\w+)\.md\) \| (.+?) \| (\S+) \| .{10,} \|$",
        (ROOT / "docs/decisions/README.md").read_text(),
        re.MULTILINE,
    )
    listed = [(int(number), page, title, date) for number, page, title, date in rows]
    records = sorted(
        (number, page.stem, title, date) for page in DECISIONS for number, (title, date, _) in decisions(page).items()
    )
    assert listed == records
    assert [number for number, *_ in records] == list(range(1, len(records) + 1))
    dates = [date for *_, date in records]
    assert dates == sorted(dates)
