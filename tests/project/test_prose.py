"""Docstrings of all Python files: summaries say what a thing does, and `Raises:` has one exception a line."""

import ast
import re
from pathlib import Path

import pytest
from support.paths import ROOT

FOLDERS = ("treedecode", "triton_kernels", "bench", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
QUESTION = re.compile(r"(What|How|Whether|Who)\b")
RAISES = re.compile(r"^Raises:\n((?:    .*\n?|\n)+)", re.MULTILINE)
# "TypeError, ValueError: ..." and "TypeError: ... ValueError: ..."
SEVERAL_EXCEPTIONS = re.compile(
    r"^    [A-Z]\w+, [A-Z]\w+|\. [A-Z]\w+(?:Error|Exhausted|Pages|Branches): ", re.MULTILINE
)


def docstrings(source: str) -> list[str]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def is_question(docstring: str) -> bool:
    return QUESTION.match(docstring) is not None


def has_crowded_raises(docstring: str) -> bool:
    section = RAISES.search(docstring)
    return section is not None and SEVERAL_EXCEPTIONS.search(section[1]) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings(path: Path):
    texts = docstrings(path.read_text())
    assert not [text.splitlines()[0] for text in texts if is_question(text)]
    assert not [text.splitlines()[0] for text in texts if has_crowded_raises(text)]


@pytest.mark.parametrize("text", ["What it does.", "How long\nit takes.", "Whether it is so.", "Who asked."])
def test_questions_are_found(text):
    assert [is_question(found) for found in docstrings(f'def f():\n    """{text}"""')] == [True]
    assert not is_question(text.lower())


@pytest.mark.parametrize(
    ("raises", "crowded"),
    [
        ("TypeError: a.\n    ValueError: b, or c.", False),
        ("TypeError: a,\n        which goes on.", False),
        ("TypeError, ValueError: a.", True),
        ("FileNotFoundError: a. ValueError: b.", True),
        ("OutOfPages: nothing was changed. OutOfBranches: b.", True),
    ],
)
def test_several_exceptions_on_a_line_are_found(raises, crowded):
    assert has_crowded_raises(f"Does it.\n\nArgs:\n    x, y: both.\n\nRaises:\n    {raises}\n") == crowded
