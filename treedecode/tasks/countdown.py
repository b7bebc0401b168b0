"""Countdown: problems that ask to reach a target from a few numbers, each used exactly once.

    Use 3 5 7 25 to make 52
    25 + 5 = 30, left 3 7 30
    30 - 7 = 23, left 3 23
    ...

A line has one operation: two of the numbers that are left, their result, and the numbers left after that. The last
line leaves one number. Divisions are exact and results are positive integers, as in the television game, so a zero is
never written. The task is the Game of 24 of Tree of Thoughts (Yao et al., 2023, arXiv:2305.10601) with any target, in
the proportions of Stream of Search (Gandhi et al., 2024, arXiv:2404.03683).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from treedecode.common.validation import int_from_to
from treedecode.tasks.base import Problem

SPLITS = ("train", "validation", "test")
OPERATORS = "+-*/"

_NUMBER = "[1-9][0-9]{0,8}"
_LINE = re.compile(rf" *({_NUMBER}) ([+*/-]) ({_NUMBER}) = ({_NUMBER}), left((?: {_NUMBER})+) *")
_HELD_OUT = 20  # one key in 20 is a test problem, another one a validation problem
_BATCH = 1024  # derivations drawn at once; another size would draw other problems from a seed
_PATIENCE = 100  # batches without a new problem, after which a split is taken to have no more


def prompt_of(numbers: Sequence[int], target: int) -> str:
    """Returns the line that asks for a target."""
    return f"Use {' '.join(map(str, numbers))} to make {target}\n"


def split_of(numbers: Sequence[int], target: int) -> str:
    """Returns the split of a problem, by its numbers in any order and its target, in every process and version."""
    key = f"{' '.join(map(str, sorted(numbers)))} {target}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % _HELD_OUT
    return {0: "test", 1: "validation"}.get(bucket, "train")


def model_path() -> Path:
    """Returns the folder of the model, tokenizer and value head that come with the package."""
    return Path(__file__).parent.parent / "data" / "countdown"


def combine(first: int, operator: str, second: int) -> int | None:
    """Returns the result of an operation; None where the rules do not allow it."""
    if operator == "/":
        return first // second if second > 0 and first % second == 0 and first > 0 else None
    result = {"+": first + second, "-": first - second, "*": first * second}[operator]
    return result if result > 0 else None


@dataclass(frozen=True)
class Countdown:
    """The task, whose problems are drawn by random derivation: random numbers, then random operations to a target.

    Problems come with `counts` numbers in turn. Their splits are disjoint as sets of (sorted numbers, target), whatever
    the seeds and settings.

    Attributes:
        counts: how many numbers a problem has, as often as they are listed.
        max_number: numbers are from 1 to this.
        max_value: limits the results of a derivation; a solution may go above it.
        min_target, max_target: targets lie between.

    Raises:
        ValueError: a field is out of range (named).
    """

    counts: tuple[int, ...] = (3, 4, 5)
    max_number: int = 25
    max_value: int = 100
    min_target: int = 10
    max_target: int = 100

    name = "countdown"
    stop = "\n"
    end = ("\n\n",)  # where a model that was shown examples goes on to the next one
    max_step_tokens = 48  # a tokenizer may spell numbers digit by digit
    max_new_tokens = 192

    def __post_init__(self) -> None:
        if not self.counts or not all(2 <= count <= 6 for count in self.counts):
            raise ValueError(f"counts: expected numbers from 2 to 6, got {self.counts!r}")
        for name in ("max_number", "max_value", "min_target", "max_target"):
            int_from_to(name, getattr(self, name), 1, 999)
        if self.max_value < self.max_number:
            raise ValueError(f"max_value: expected at least max_number = {self.max_number}, got {self.max_value}")
        if not self.min_target <= self.max_target <= self.max_value:
            raise ValueError(
                f"max_target: expected from min_target = {self.min_target} to max_value = {self.max_value}, "
                f"got {self.max_target}"
            )

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Returns distinct problems; a smaller number of them is the beginning of a larger one.

        Raises:
            ValueError: there is no such split, or it does not have so many problems.
        """
        streams = {count: self._distinct(count, split, seed) for count in self.counts}
        problems = []
        for i in range(num_problems):
            numbers, target = next(streams[self.counts[i % len(self.counts)]])
            problems.append(
                Problem(
                    id=f"{'-'.join(map(str, numbers))}={target}",
                    prompt=prompt_of(numbers, target),
                    group=f"{len(numbers)} numbers",
                    data={"numbers": numbers, "target": target},
                    task=self,
                )
            )
        return problems

    def _distinct(self, count: int, split: str, seed: int) -> Iterator[tuple[tuple[int, ...], int]]:
        seen: set[tuple[tuple[int, ...], int]] = set()
        misses = 0
        for numbers, steps in self.derivations(count, split=split, seed=seed):
            key = numbers, steps[-1][3]
            misses = misses + 1 if key in seen else 0
            if misses > _PATIENCE * _BATCH:
                raise ValueError(f"num_problems: the {split} split has about {len(seen)} problems of {count} numbers")
            if key not in seen:
                seen.add(key)
                yield key

    def derivations(
        self, count: int, *, split: str = "train", seed: int = 0
    ) -> Iterator[tuple[tuple[int, ...], list[tuple[int, str, int, int]]]]:
        """Iterates without end over solved problems: sorted numbers, and steps (first, operator, second, result).

        Pairs and the allowed operations on them are equally likely; the larger number stands first. A division by one
        is left out, as it is a multiplication by one.

        Raises:
            ValueError: there is no such split, or it has no such problems.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        rng = np.random.default_rng([seed, count])
        barren = 0
        while barren < _PATIENCE:
            barren += 1
            numbers = rng.integers(1, self.max_number + 1, (_BATCH, count))
            steps = self._random_steps(rng, numbers)  # [_BATCH, count - 1, 4]
            targets = steps[:, -1, 3]
            numbers.sort(axis=1)
            for row in np.flatnonzero((targets >= self.min_target) & (targets <= self.max_target)):
                key = tuple(numbers[row].tolist())
                if split_of(key, int(targets[row])) == split:
                    barren = 0
                    yield key, [(a, OPERATORS[op], b, result) for a, op, b, result in steps[row].tolist()]
        raise ValueError(f"split: {self} has no {split} problems of {count} numbers, or hardly any")

    def _random_steps(self, rng: np.random.Generator, numbers: np.ndarray) -> np.ndarray:
        """Draws operations on `[n, count]`: `[n, count - 1, 4]` (first, index of the operator, second, result)."""
        rows = np.arange(len(numbers))
        remaining, steps = numbers, []
        while remaining.shape[1] > 1:
            remaining = rng.permuted(remaining, axis=1)
            high, low = remaining[:, :2].max(axis=1), remaining[:, :2].min(axis=1)
            results = np.stack([high + low, high - low, high * low, high // low], axis=1)
            allowed = (results > 0) & (results <= self.max_value)
            # one operation is always allowed: of two equal numbers the quotient, of others the difference
            allowed[:, 3] &= (high % low == 0) & ((low > 1) | (high == 1))
            operator = np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1)
            result = results[rows, operator]
            steps.append(np.stack([high, operator, low, result], axis=1))
            remaining = np.concatenate([remaining[:, 2:], result[:, None]], axis=1)
        return np.stack(steps, axis=1)

    def solved(
        self, count: int, *, split: str = "train", seed: int = 0, misses: float = 0.0
    ) -> Iterator[tuple[str, str]]:
        """Iterates without end over (prompt, solution) of `derivations`, the texts that a model is trained on.

        Args:
            misses: share of prompts that ask for another target than the lines come to. A model that has only seen
                lines that come to the target learns to write it at the end, whatever the result of the operation.
        """
        rng = np.random.default_rng([seed, count, 1])
        previous_target = 0  # of other numbers, and distributed like a target
        for numbers, steps in self.derivations(count, split=split, seed=seed):
            target = steps[-1][3]
            is_miss = previous_target > 0 and rng.random() < misses and split_of(numbers, previous_target) == split
            yield prompt_of(numbers, previous_target if is_miss else target), solution_of(numbers, steps)
            previous_target = target

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Returns solved training problems, with `counts` numbers in turn."""
        streams = {numbers: self.solved(numbers, seed=0) for numbers in self.counts}
        return [next(streams[self.counts[i % len(self.counts)]]) for i in range(count)]

    def extract(self, text: str) -> str | None:
        """Returns the expression that the lines build, such as `(25 + 5 - 7) * 3`.

        Sums and products are flattened and sorted, so that solutions which differ in order or grouping alone come to
        the same expression. Results are taken as written: `verify` tells whether they are right, and a vote among
        answers must not know. Lines after the one that leaves one number are not read. Returns None while more than one
        number is left, and where a line cannot be read or takes numbers that are not there.
        """
        pool = _replay(text)
        return None if pool is None or len(pool) != 1 else pool[0].text

    def equivalent(self, first: str, second: str) -> bool:
        """Returns whether two expressions are the same text."""
        return first == second

    def is_final(self, text: str) -> bool:
        """Returns whether one number is left, or a line is wrong, so that `extract` gives None whatever follows."""
        complete_lines = text[: text.rfind("\n") + 1]
        pool = _replay(complete_lines)
        if pool is None or len(pool) == 1:
            return True
        if complete_lines == text:
            return False
        pool = _replay(text)  # if it cannot be read, that may be because the last line has not ended
        return pool is not None and len(pool) == 1

    def verify(self, problem: Problem, text: str) -> bool:
        """Returns whether every line is right, the numbers are the problem's, all are used, and the target is left.

        Lines after the one that leaves one number are not read.
        """
        pool = _replay(text, tuple(problem.data["numbers"]))
        return pool is not None and len(pool) == 1 and pool[0].is_right and pool[0].value == problem.data["target"]


@dataclass(frozen=True)
class _Item:
    """A number that is left: its value as written, and the flattened sum or product that made it."""

    value: int
    is_right: bool  # every line that made it is right
    operators: str  # "+-" for a sum, "*/" for a product, "" for a number of the problem
    direct: tuple[str, ...]  # terms added or factors
    inverse: tuple[str, ...]  # terms subtracted or divisors

    @property
    def text(self) -> str:
        """The expression that made it."""
        if not self.operators:
            return self.direct[0]
        direct, inverse = (f" {operator} " for operator in self.operators)
        return direct.join(self.direct) + "".join(inverse + part for part in self.inverse)

    def parts(self, operators: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns its direct and inverse parts in a sum or a product."""
        if self.operators == operators:
            return self.direct, self.inverse
        return ((f"({self.text})" if self.operators == "+-" else self.text,), ())


def _number(value: int) -> _Item:
    return _Item(value, True, "", (str(value),), ())


def _joined(first: _Item, operator: str, second: _Item, value: int) -> _Item:
    operators = "+-" if operator in "+-" else "*/"
    direct, inverse = first.parts(operators)
    others = second.parts(operators)
    if operator in "-/":
        others = others[::-1]
    is_right = first.is_right and second.is_right and combine(first.value, operator, second.value) == value
    return _Item(value, is_right, operators, tuple(sorted(direct + others[0])), tuple(sorted(inverse + others[1])))


@lru_cache(maxsize=1 << 12)  # a search reads the same text again, for its end and for its answer
def _replay(text: str, numbers: tuple[int, ...] | None = None) -> tuple[_Item, ...] | None:
    """Returns the numbers left after the lines of a solution, up to the line that leaves a single one.

    Returns None if a line cannot be read, takes a number that is not there, or names other numbers as left.

    Without `numbers` the problem has those of the first line, and no number before it. Of equal numbers the oldest is
    used, so that a text stands for one expression.
    """
    pool = [_number(value) for value in numbers or ()]
    for line in text.removesuffix("\n").split("\n") if text else ():
        if len(pool) == 1:
            break
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        first, second, result = int(match[1]), int(match[3]), int(match[4])
        remaining = [int(number) for number in match[5].split()]
        if result not in remaining:
            return None
        if not pool:
            others = remaining.copy()
            others.remove(result)
            pool = [_number(value) for value in (first, second, *others)]
        taken = []
        for value in (first, second):
            item = next((item for item in pool if item.value == value), None)
            if item is None:
                return None
            pool.remove(item)
            taken.append(item)
        pool.append(_joined(taken[0], match[2], taken[1], result))
        if sorted(item.value for item in pool) != sorted(remaining):
            return None
    return tuple(pool)


def solution_of(numbers: Sequence[int], steps: Sequence[tuple[int, str, int, int]]) -> str:
    """Writes the lines of a derivation, with the numbers left in ascending order."""
    remaining, lines = list(numbers), []
    for first, operator, second, result in steps:
        remaining.remove(first)
        remaining.remove(second)
        remaining = sorted([*remaining, result])
        lines.append(f"{first} {operator} {second} = {result}, left {' '.join(map(str, remaining))}\n")
    return "".join(lines)


def solve(numbers: Sequence[int], target: int) -> str | None:
    """Finds a solution by exhaustive search, the first in order of numbers and operators; None where there is none."""
    steps = _solve(tuple(sorted(numbers)), target)
    return None if steps is None else solution_of(numbers, steps)


@lru_cache(maxsize=1 << 20)
def _solve(numbers: tuple[int, ...], target: int) -> tuple[tuple[int, str, int, int], ...] | None:
    if len(numbers) == 1:
        return () if numbers[0] == target else None
    for i, j in combinations(range(len(numbers)), 2):
        others = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for operator in OPERATORS:
            result = combine(numbers[j], operator, numbers[i])
            if result is not None:
                steps = _solve(tuple(sorted((*others, result))), target)
                if steps is not None:
                    return ((numbers[j], operator, numbers[i], result), *steps)
    return None
