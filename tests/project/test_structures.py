"""`docs/structures.md` has one row for every file, and the picture of the architecture shows every room."""

import re
from pathlib import Path

from support.paths import ROOT

from treedecode import ops

PAGE = ROOT / "docs" / "structures.md"
FOLDERS = ("treedecode", "triton_kernels", "csrc", "bench")
BUILT = {".so", ".pyc"}


def files() -> set[Path]:
    """Files that the page describes; `__init__.py` of a room is part of its room."""
    paths = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    rooms = {path for path in paths if path.name == "__init__.py"} - {ROOT / "treedecode" / "__init__.py"}
    return {path for path in paths - rooms if path.suffix not in BUILT}


def rows() -> list[tuple[str, str]]:
    """Folder and name of every row."""
    parts = re.split(r"^## `(.+)/`$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    return [(folder, name) for folder, text in sections for name in re.findall(r"^\| `(.+?)` \| .{5,} \|$", text, re.M)]


def covered(folder: str, name: str) -> set[Path]:
    """Files that a row stands for: a file, all below a folder, or a file for every op."""
    if name.endswith("/"):
        return {path for path in (ROOT / folder / name).rglob("*") if path.is_file()}
    names = [name.replace("<op>", op) for op in ops.names()] if "<op>" in name else [name]
    return {path for one in names if (path := ROOT / folder / one).is_file()}


def test_every_row_names_files_that_exist():
    assert [row for row in rows() if not covered(*row)] == []


def test_every_file_has_one_row():
    rows_of: dict[Path, list[tuple[str, str]]] = {path: [] for path in files()}
    for row in rows():
        for path in covered(*row) & rows_of.keys():
            rows_of[path].append(row)
    assert {str(path.relative_to(ROOT)): found for path, found in rows_of.items() if len(found) != 1} == {}


def test_the_picture_shows_every_room():
    picture = (ROOT / "docs" / "rooms.svg").read_text()
    rooms = {path.parent.name for path in (ROOT / "treedecode").glob("*/__init__.py")} | {"triton_kernels", "csrc"}
    assert rooms == set(re.findall(r'class="(?:name|label)"[^>]*>(\w+)<', picture)) - {"commands"}
