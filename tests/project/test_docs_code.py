"""The blocks of the documentation: Python runs as it stands, and commands have the options that are given."""

import re
import shlex

import pytest
from support.paths import ROOT

from treedecode.cli.main import _parser

CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [path for path in sorted(ROOT.glob("docs/**/*.md")) if CODE.search(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(page, one_thread, capsys):
    text, names = page.read_text(), {"__name__": page.stem}
    for block in CODE.finditer(text):
        first_line = text[: block.start(1)].count("\n")
        exec(compile("\n" * first_line + block[1], str(page), "exec"), names)  # an error names the page's line
    assert capsys.readouterr().out


def commands(text: str) -> list[list[str]]:
    """Arguments of the `treedecode` commands in a text's shell blocks."""
    blocks = re.findall(r"^```(?:|sh|bash|console)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ") for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("treedecode ")]


def test_commands_have_their_options():
    given = [one for path in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"] for one in commands(path.read_text())]
    assert len(given) > 5
    for arguments in given:
        _parser().parse_args(arguments)


def test_the_walk_finds_code():
    assert ROOT / "docs/strategies.md" in PAGES
    text = "```\n$ treedecode solve \\\n    --out a  # b\ntokens 5\n```\n```python\ntreedecode no\n```\n"
    assert commands(text) == [["solve", "--out", "a"]]
