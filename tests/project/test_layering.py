"""The house: rooms import one way, files stay readable, and only env.py reads the environment."""

import ast
import re
from collections.abc import Collection
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "treedecode"
MODULES = {path.relative_to(ROOT): path for path in sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("triton_kernels/*.py")])}
MAX_ENTRIES = 20  # directly in treedecode/
MAX_LINES = 400

# The rooms from the ground up, and the rooms that each may import. Every one of them stands above in this list.
ROOMS: dict[str, set[str]] = {
    "common": set(),
    "reference": set(),
    "triton_kernels": set(),
    "ops": {"common", "reference", "triton_kernels"},
    "cache": {"common", "ops"},
    "models": {"common", "ops"},
    "accounting": {"common", "models"},
    "engine": {"common", "ops", "cache", "models", "accounting"},
    "decoding": {"common", "ops", "cache", "models", "accounting", "engine"},
    "tasks": {"common"},
    "verify": {"common", "accounting", "models", "engine", "decoding", "tasks"},
    "search": {"common", "accounting", "models", "engine", "decoding", "tasks", "verify"},
    "reporting": {"common", "accounting", "decoding", "search"},
    "allocation": {"common", "accounting", "models", "engine", "decoding", "tasks", "verify", "search"},
    "strategies": {"common", "accounting", "engine", "decoding", "tasks", "verify", "search", "allocation"},
    "study": {
        *("common", "ops", "cache", "accounting", "engine", "decoding", "tasks", "verify", "search", "allocation"),
        "strategies",
    },
    "integrations": {"common", "ops", "models", "engine", "decoding"},
    "cli": {
        *("common", "ops", "accounting", "models", "engine", "decoding", "tasks", "verify", "search", "reporting"),
        *("allocation", "strategies", "study", "integrations"),
    },
}
NATIVE = {"_host": {"engine"}}  # modules that are built, and the rooms that use them
FREE = {"__init__.py", "_host.pyi", "triton_kernels.pyi", "py.typed", "data"}  # entries that are no rooms


def room_of(module: Path) -> str:
    """`ops` of treedecode/ops/sample.py; `triton_kernels` of a file there."""
    return module.parts[0] if module.parts[0] == "triton_kernels" else module.parts[1].removesuffix(".py")


def dotted(module: Path) -> str:
    """`treedecode.ops` of treedecode/ops/__init__.py."""
    parts = ("treedecode", *module.parts) if module.parts[0] == "triton_kernels" else module.parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


NAMES = {dotted(module): module for module in MODULES}
BENCHMARKS = {
    path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", "."): path
    for path in ROOT.glob("bench/**/*.py")
    if path.name != "__init__.py"
}


def imports(tree: ast.AST) -> set[str]:
    """Absolute dotted names imported anywhere in a module: at its top, in functions, and where only types need them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a module stands"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported(tree: ast.AST, names: Collection[str] = NAMES) -> set[str]:
    """Modules among `names` that a module imports, the longest name that is a file's."""
    found = set()
    for name in imports(tree):
        while name and name not in names:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", "treedecode"}


def rooms_imported(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("treedecode.")} & (
        ROOMS.keys() | NATIVE.keys()
    )


def parsed(module: Path) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def rings(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach each other."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in graph.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reached = {node: reach(node) for node in graph}
    found = [frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]]
    return [set(ring) for ring in sorted(set(found), key=sorted)]


def reads_environment(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in ("environ", "environb", "getenv"))


def test_every_room_is_listed():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix != ".so"}
    rooms = ROOMS.keys() - {"triton_kernels"}
    assert rooms <= entries
    assert entries - rooms - FREE == set(), "a room or a file that ROOMS does not list"


def test_few_entries():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix in ("", ".py")]
    assert len(entries) <= MAX_ENTRIES, sorted(path.name for path in entries)


def test_rooms_may_use_rooms_above_alone():
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= above, f"{room} may use {allowed - above}, which stand below it or nowhere"
        above.add(room)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module):
    if module == Path("treedecode/__init__.py"):  # gives all rooms' public names, on first use
        return
    room = room_of(module)
    assert room in ROOMS, f"{module} is in no room"
    used = rooms_imported(parsed(module)) - {room}
    allowed = ROOMS[room] | {name for name, users in NATIVE.items() if room in users}
    assert used <= allowed, f"{module} may import {sorted(allowed)}, and imports {sorted(used - allowed)}"


def test_no_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if module != Path("treedecode/__init__.py"):
            graph.setdefault(room_of(module), set()).update(rooms_imported(parsed(module)) - {room_of(module)})
    assert rings(graph) == []


def test_no_files_import_each_other():
    graph = {name: modules_imported(parsed(module)) - {name} for name, module in NAMES.items() if name != "treedecode"}
    assert rings(graph) == []


def test_no_benchmarks_import_each_other():
    graph = {name: modules_imported(ast.parse(path.read_text()), BENCHMARKS) for name, path in BENCHMARKS.items()}
    assert "bench.gpu.harness" in graph["bench.gpu.select"]
    assert rings(graph) == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_only_env_reads_the_environment(module):
    if module.name != "env.py":
        assert not list(reads_environment(parsed(module)))


def test_files_stay_short():
    native = [path for end in ("cpp", "h", "cu", "cuh") for path in ROOT.glob(f"csrc/**/*.{end}")]
    paths = [*MODULES.values(), *native, *ROOT.glob("tests/**/*.*"), *ROOT.glob("bench/**/*.py")]
    paths = [path for path in paths if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_kernels_and_host_code_see_no_torch():
    for path in [*ROOT.glob("csrc/cpu/*"), *ROOT.glob("csrc/host/*")]:
        includes = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        assert not [name for name in includes if name.startswith("../")], path


CUDA_ROOMS = {"common": set(), "plan": set(), "pages": set(), "logits": set(), "attention": set()}
# types, the layout of rows of integers, and what both sides compute alike: costs of plans, keys, random numbers
SHARED_WITH_CPU = {
    f"../../cpu/{name}.h" for name in ("dtypes", "keys", "page_status", "philox", "plan_tree", "strides")
}


def test_cuda_rooms_use_common_alone():
    files = list(ROOT.glob("csrc/cuda/**/*.*"))
    assert {path.relative_to(ROOT / "csrc" / "cuda").parts[0] for path in files if path.is_file()} == CUDA_ROOMS.keys()
    for path in ROOT.glob("csrc/cuda/*/*.*"):
        includes = set(re.findall(r'#include [<"]([^>"]+)', path.read_text()))
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path
        others = {name for name in includes if name.startswith("../") and not name.startswith("../common/")}
        assert others <= SHARED_WITH_CPU, path


def test_only_ptx_uses_what_the_host_shim_lacks():
    for path in {*ROOT.glob("csrc/cuda/*/*.cuh")} - {ROOT / "csrc/cuda/common/ptx.cuh"}:
        assert not re.findall(
            r"\basm\b|\b__(?:shfl|sync|ballot|cvta|ld)\w*|\bthreadIdx\b|\b__shared__\b", path.read_text()
        ), path


def test_package_imports_without_torch_or_native_code():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    at_run_time = [node for node in body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    top_level = [node for node in at_run_time if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {name.split(".")[0] for name in imports(ast.Module(top_level, []))} <= {"importlib", "os", "sys", "typing"}


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import treedecode.search.solve", {"search"}),
        ("from treedecode import ops, reference", {"ops", "reference"}),
        ("def f():\n    from treedecode.decoding.decoder import Decoder", {"decoding"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from treedecode.engine import jobs", {"engine"}),
    ],
)
def test_the_walk_sees_imports(source, rooms):
    assert rooms_imported(ast.parse(source)) == rooms


def test_rings_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f"}, "h": {"a"}}
    assert rings(graph) == [{"a", "b", "c"}, {"f", "g"}]


def test_the_walk_sees_the_environment():
    assert sorted(reads_environment(ast.parse("import os\nos.environ['A']\nfrom os import getenv"))) == [2, 3]


def test_no_test_module_imports_another():
    tests = {path.stem for path in ROOT.glob("tests/**/test_*.py")}
    for path in ROOT.glob("tests/**/*.py"):
        parts = {part for name in imports(ast.parse(path.read_text())) for part in name.split(".")}
        assert not parts & tests, path
