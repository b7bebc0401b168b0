"""Mutates sampled places of the search's rooms, and runs the tests that cover each: what no test notices is listed.

Mutants are cosmic-ray's. The tests of a line are those that ran it, by coverage's contexts; a line that runs at import
(a default, a constant) has the tests of its file. A mutant is killed when one of them fails or takes too long.
"""

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import coverage
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "mutants"
ROOMS = ("engine", "decoding", "search", "strategies", "allocation")
TESTS = ("accounting", "allocation", "cache", "cli", "decoding", "engine", "integrations", "models", "reporting")
TESTS += ("search", "strategies", "study", "tasks", "verify")
SLOWEST = 60.0  # seconds of a single test with a mutant, and beyond three times all its tests


@dataclass(frozen=True)
class Mutant:
    """A change of one place: `occurrence` of what `operator` mutates in a file, which begins in `line`."""

    path: str
    line: int
    operator: str
    occurrence: int

    def code(self) -> str:
        """Returns the file's text with the change."""
        text = (ROOT / self.path).read_text()
        mutated = MutationVisitor.mutate_code(text, get_operator(self.operator)(), self.occurrence)
        assert mutated not in (None, text)
        return mutated


class Syntax:
    """Tells places of a file that cosmic-ray takes for code: annotations, and the `*` before keyword arguments."""

    def __init__(self, path: Path) -> None:
        self._hints, self._operators = [], []
        for node in ast.walk(ast.parse(path.read_text())):
            for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
                if hint is not None:
                    self._hints.append(((hint.lineno, hint.col_offset), (hint.end_lineno, hint.end_col_offset)))
            if isinstance(node, ast.BinOp):
                left, right = node.left, node.right
                self._operators.append(((left.end_lineno, left.end_col_offset), (right.lineno, right.col_offset)))

    def has_code(self, place: tuple[int, int], operator: str) -> bool:
        """Returns whether code that runs is at (line, column)."""
        if any(begin <= place < end for begin, end in self._hints):
            return False
        return "BinaryOperator" not in operator or any(begin <= place < end for begin, end in self._operators)


def mutants() -> Iterator[Mutant]:
    """Iterates over all mutants of the rooms, annotations and operators with arguments left out."""
    for room in ROOMS:
        for path in sorted((ROOT / "treedecode" / room).rglob("*.py")):
            tree, syntax = get_ast_from_path(path), Syntax(path)
            for name in sorted(operator_names()):
                operator_class = get_operator(name)
                if operator_class.arguments():
                    continue
                operator = operator_class()
                places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
                for occurrence, (begin, _) in enumerate(places):
                    if syntax.has_code(begin, name):
                        yield Mutant(str(path.relative_to(ROOT)), begin[0], name, occurrence)


def sampled(count: int, seed: int) -> list[Mutant]:
    """Draws places, and one mutant of each, so that an operator with many variants counts once."""
    places = defaultdict(list)
    for mutant in mutants():
        places[mutant.path, mutant.line, mutant.operator.split("/")[-1].split("_")[0]].append(mutant)
    draw = random.Random(seed)
    return [draw.choice(places[place]) for place in draw.sample(sorted(places), count)]


def measure_coverage() -> None:
    """Runs the tests once with coverage, and notes how long each takes."""
    folders = [f"tests/{name}" for name in TESTS]
    options = ["--cov=treedecode", "--cov-context=test", "--cov-report=", f"--junit-xml={WORK / 'times.xml'}"]
    command = [sys.executable, "-m", "pytest", *folders, *options, "-n", str(os.cpu_count()), "--dist", "loadfile"]
    environment = os.environ | {"COVERAGE_FILE": str(WORK / "coverage"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


class Coverage:
    """The tests that ran each line, the shortest first."""

    def __init__(self) -> None:
        self._data = coverage.CoverageData(str(WORK / "coverage"))
        self._data.read()
        self.seconds = {}
        for case in ElementTree.parse(WORK / "times.xml").iter("testcase"):
            name = case.get("classname", "").replace(".", "/") + ".py::" + case.get("name", "")
            self.seconds[name] = float(case.get("time", 0))

    def tests(self, mutant: Mutant) -> list[str]:
        """Returns the tests that ran the mutant's line; where only imports did, those that ran any line of the file."""
        by_line = self._data.contexts_by_lineno(str(ROOT / mutant.path))
        found = {context.partition("|")[0] for context in by_line.get(mutant.line, ())} - {""}
        if not found:
            found = {context.partition("|")[0] for contexts in by_line.values() for context in contexts} - {""}
        return sorted(found, key=lambda test: (self.seconds.get(test, 1.0), test))


def copy_tree(folder: Path) -> None:
    """Copies what tests need: files under version control, and the native libraries."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in [*files, *(str(path.relative_to(ROOT)) for path in (ROOT / "treedecode").rglob("*.so"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


class Worker:
    """Runs tests in a copy of the tree, in forks of a process that has imported what takes long."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        copy_tree(folder)
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, folder))
        self._process.start()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()

    def is_killed(self, mutant: Mutant, tests: list[str], seconds: float) -> bool:
        """Runs the tests with the mutant in the tree."""
        target = self._folder / mutant.path
        target.write_text(mutant.code())
        (self._folder / "tests.txt").write_text("\n".join(tests))
        try:
            self._connection.send(3 * seconds + SLOWEST)
            return self._connection.recv() != 0
        finally:
            shutil.copy2(ROOT / mutant.path, target)


def _serve(connection: Any, folder: Path) -> None:
    """Runs pytest in a fork for each number of seconds that comes, and answers with its exit status."""
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path.insert(0, str(folder))
    for name in ("torch", "transformers", "hypothesis", "pytest"):
        importlib.import_module(name)
    while True:
        seconds = connection.recv()
        process = multiprocessing.get_context("fork").Process(target=_run_tests)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        connection.send(process.exitcode)


def _run_tests() -> None:
    os.setpgid(0, 0)  # with the processes that tests start
    with open("output.txt", "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        import pytest

        sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", f"--timeout={SLOWEST}", "@tests.txt"]))


def shown(mutant: Mutant) -> str:
    """Returns the lines that the mutant changes, before and after."""
    old, new = (ROOT / mutant.path).read_text().splitlines(), mutant.code().splitlines()
    first = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])
    return f"{mutant.path}:{first + 1}\n    - {old[first].strip()}\n    + {new[first].strip()}"


def main() -> int:
    """Runs the command; the exit status is 1 where fewer than 90 % are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--keep-coverage", action="store_true", help="that of the last run")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if not (arguments.keep_coverage and (WORK / "times.xml").exists()):
        measure_coverage()
    covered = Coverage()
    workers: SimpleQueue[Worker] = SimpleQueue()
    for i in range(arguments.workers):
        workers.put(Worker(WORK / f"tree{i}"))

    def judge(mutant: Mutant) -> dict[str, object]:
        tests = covered.tests(mutant)
        worker = workers.get()
        try:
            killed = bool(tests) and worker.is_killed(mutant, tests, sum(covered.seconds.get(t, 1.0) for t in tests))
        finally:
            workers.put(worker)
        print("killed  " if killed else "survived", f"{len(tests):5} tests", shown(mutant), flush=True)
        return {"killed": killed, "num_tests": len(tests), **vars(mutant), "change": shown(mutant)}

    with ThreadPoolExecutor(arguments.workers) as pool:
        results = list(pool.map(judge, sampled(arguments.count, arguments.seed)))
    while not workers.empty():
        workers.get().close()
    (WORK / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    survivors = [str(result["change"]) for result in results if not result["killed"]]
    num_killed = len(results) - len(survivors)
    print(*survivors, f"{num_killed} of {len(results)} killed, {num_killed / len(results):.1%}", sep="\n")
    return int(num_killed < 0.9 * len(results))


if __name__ == "__main__":
    sys.exit(main())
