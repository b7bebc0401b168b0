"""Countdown: reach a target from a few numbers, each used exactly once, one operation a line.

    Use 3 5 7 25 to make 52
    25 + 5 = 30, left 3 7 30
    30 - 7 = 23, left 3 23
    ...

A line names two of the numbers that are left, what they make, and the numbers left after that; the last line leaves
one. Divisions are exact and results are positive integers, as in the television game, so a zero is never written. The
task is the Game of 24 of Tree of Thoughts (Yao et al., 2023, arXiv:2305.10601) with any target, in the proportions of
Stream of Search (Gandhi et al., 2024, arXiv:2404.03683).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from treedecode.tasks.base import Problem

SPLITS = ("train", "validation", "test")
OPERATORS = "+-*/"

_NUMBER = "[1-9][0-9]{0,8}"
_LINE = re.compile(rf" *({_NUMBER}) ([+*/-]) ({_NUMBER}) = ({_NUMBER}), left((?: {_NUMBER})+) *")
_HELD_OUT = 20  # one key in so many is a test problem, another one a validation problem
_BATCH = 1024  # derivations drawn at once; part of what a seed means
_PATIENCE = 100  # batches without anything new, after which there is nothing new to come


def prompt_of(numbers: Sequence[int], target: int) -> str:
    return f"Use {' '.join(map(str, numbers))} to make {target}\n"


def split_of(numbers: Sequence[int], target: int) -> str:
    """The split a problem belongs to, by its numbers in any order and its target, in every process and version."""
    key = f"{' '.join(map(str, sorted(numbers)))} {target}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % _HELD_OUT
    return {0: "test", 1: "validation"}.get(bucket, "train")


def model_path() -> Path:
    """The folder of the model, tokenizer and value head that come with the package."""
    return Path(__file__).parent.parent / "data" / "countdown"


def combine(first: int, operator: str, second: int) -> int | None:
    """What an operation gives by the rules; None where it is not allowed."""
    if operator == "/":
        return first // second if second > 0 and first % second == 0 and first > 0 else None
    result = {"+": first + second, "-": first - second, "*": first * second}[operator]
    return result if result > 0 else None


@dataclass(frozen=True)
class Countdown:
    """The task, with problems drawn by random derivation: numbers, then operations at random, then what they made.

    Problems come with `counts` numbers in turn. Their splits are disjoint as sets of (sorted numbers, target), whatever
    the seeds and settings.

    Attributes:
        counts: how many numbers a problem has, as often as they are listed.
        max_number: numbers are from 1 to this.
        max_value: no result on the way of the derivation is above; a solution may go there.
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
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 999:
                raise ValueError(f"{name}: expected an int from 1 to 999, got {value!r}")
        if self.max_value < self.max_number:
            raise ValueError(f"max_value: expected at least max_number = {self.max_number}, got {self.max_value}")
        if not self.min_target <= self.max_target <= self.max_value:
            raise ValueError(
                f"max_target: expected from min_target = {self.min_target} to max_value = {self.max_value}, "
                f"got {self.max_target}"
            )

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Distinct problems; fewer of them are the beginning of more.

        Raises:
            ValueError: no such split, or it does not have so many problems.
        """
        streams = {count: self._distinct(count, split, seed) for count in self.counts}
        found = []
        for i in range(num_problems):
            numbers, target = next(streams[self.counts[i % len(self.counts)]])
            name = f"{'-'.join(map(str, numbers))}={target}"
            found.append(
                Problem(
                    id=name,
                    prompt=prompt_of(numbers, target),
                    group=f"{len(numbers)} numbers",
                    data={"numbers": numbers, "target": target},
                    task=self,
                )
            )
        return found

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
        """Solved problems without end: sorted numbers, and the steps (first, operator, second, result) to the target.

        Pairs and the allowed operations on them are equally likely; the larger number stands first. A division by one
        is left out, as it is a multiplication by one.

        Raises:
            ValueError: no such split, or it has no such problems.
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
        """`[n, count - 1, 4]`: (first, index of the operator, second, result) of random operations on `[n, count]`."""
        rows = np.arange(len(numbers))
        left, steps = numbers, []
        while left.shape[1] > 1:
            left = rng.permuted(left, axis=1)
            high, low = left[:, :2].max(axis=1), left[:, :2].min(axis=1)
            results = np.stack([high + low, high - low, high * low, high // low], axis=1)
            allowed = (results > 0) & (results <= self.max_value)
            # of two equal numbers the quotient is allowed, of others the difference: there is always one
            allowed[:, 3] &= (high % low == 0) & ((low > 1) | (high == 1))
            operator = np.where(allowed, rng.random(allowed.shape), -1.0).argmax(axis=1)
            result = results[rows, operator]
            steps.append(np.stack([high, operator, low, result], axis=1))
            left = np.concatenate([left[:, 2:], result[:, None]], axis=1)
        return np.stack(steps, axis=1)

    def solved(
        self, count: int, *, split: str = "train", seed: int = 0, misses: float = 0.0
    ) -> Iterator[tuple[str, str]]:
        """(prompt, solution) of `derivations`, without end: what a model is trained on.

        Args:
            misses: share of prompts that ask for another target than the lines come to. A model that has only seen
                lines that come to the target learns to write it at the end, whatever the operation gives.
        """
        rng = np.random.default_rng([seed, count, 1])
        other = 0
        for numbers, steps in self.derivations(count, split=split, seed=seed):
            target = steps[-1][3]
            miss = other > 0 and rng.random() < misses and split_of(numbers, other) == split
            yield prompt_of(numbers, other if miss else target), solution_of(numbers, steps)
            other = target  # of other numbers, and as likely as a target can be

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Solved training problems, with `counts` numbers in turn."""
        streams = {numbers: self.solved(numbers, seed=0) for numbers in self.counts}
        return [next(streams[self.counts[i % len(self.counts)]]) for i in range(count)]

    def extract(self, text: str) -> str | None:
        """The expression that the lines build, `(25 + 5 - 7) * 3`.

        Sums and products are flattened and sorted, so that solutions which differ in order or grouping alone come to
        the same expression. Results are taken as written: whether they are right is for `verify` to say, and a vote
        among answers must not know. Lines after the one that leaves one number are not read. None while more than one
        number is left, and where a line cannot be read or takes numbers that are not there.
        """
        pool = _replay(text)
        return None if pool is None or len(pool) != 1 else pool[0].text

    def equivalent(self, first: str, second: str) -> bool:
        return first == second

    def is_final(self, text: str) -> bool:
        """Whether one number is left, or a line has broken the solution off: `extract` gives None, whatever follows."""
        ended = text[: text.rfind("\n") + 1]
        pool = _replay(ended)
        if pool is None or len(pool) == 1:
            return True
        if ended == text:
            return False
        pool = _replay(text)  # with the line that has not ended, which may be unreadable only because it has not
        return pool is not None and len(pool) == 1

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether every line is right, the numbers are the problem's, all are used, and the target is left.

        Lines after the one that leaves one number are not read.
        """
        pool = _replay(text, tuple(problem.data["numbers"]))
        return pool is not None and len(pool) == 1 and pool[0].right and pool[0].value == problem.data["target"]


@dataclass(frozen=True)
class _Item:
    """A number that is left: its value as written, and the sum or product it was made as, flattened."""

    value: int
    right: bool  # whether every line it was made by is
    operators: str  # "+-" for a sum, "*/" for a product, "" for a number of the problem
    direct: tuple[str, ...]  # terms added or factors
    inverse: tuple[str, ...]  # terms subtracted or divisors

    @property
    def text(self) -> str:
        if not self.operators:
            return self.direct[0]
        direct, inverse = (f" {operator} " for operator in self.operators)
        return direct.join(self.direct) + "".join(inverse + part for part in self.inverse)

    def parts(self, operators: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What it puts into a sum or product."""
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
    right = first.right and second.right and combine(first.value, operator, second.value) == value
    return _Item(value, right, operators, tuple(sorted(direct + others[0])), tuple(sorted(inverse + others[1])))


@lru_cache(maxsize=1 << 12)  # a search asks for the same text again: is it final, what does it come to
def _replay(text: str, numbers: tuple[int, ...] | None = None) -> tuple[_Item, ...] | None:
    """What is left after the lines of a solution, up to the one that leaves a single number.

    None if a line cannot be read, takes a number that is not there, or says that others are left than are.

    Without `numbers` they are those the first line speaks of, and there is nothing left before it. Of equal numbers the
    one that has been left for longest is used, so that a text stands for one expression.
    """
    pool = [_number(value) for value in numbers or ()]
    for line in text.removesuffix("\n").split("\n") if text else ():
        if len(pool) == 1:
            break
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        first, second, result = int(match[1]), int(match[3]), int(match[4])
        left = [int(number) for number in match[5].split()]
        if result not in left:
            return None
        if not pool:
            others = left.copy()
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
        if sorted(item.value for item in pool) != sorted(left):
            return None
    return tuple(pool)


def solution_of(numbers: Sequence[int], steps: Sequence[tuple[int, str, int, int]]) -> str:
    """The lines of a derivation; what is left is written in ascending order."""
    left, lines = list(numbers), []
    for first, operator, second, result in steps:
        left.remove(first)
        left.remove(second)
        left = sorted([*left, result])
        lines.append(f"{first} {operator} {second} = {result}, left {' '.join(map(str, left))}\n")
    return "".join(lines)


def solve(numbers: Sequence[int], target: int) -> str | None:
    """A solution by exhaustive search, the first in order of numbers and operators; None where there is none."""
    steps = _solve(tuple(sorted(numbers)), target)
    return None if steps is None else solution_of(numbers, steps)


@lru_cache(maxsize=1 << 20)
def _solve(left: tuple[int, ...], target: int) -> tuple[tuple[int, str, int, int], ...] | None:
    if len(left) == 1:
        return () if left[0] == target else None
    for i, j in combinations(range(len(left)), 2):
        others = left[:i] + left[i + 1 : j] + left[j + 1 :]
        for operator in OPERATORS:
            result = combine(left[j], operator, left[i])
            if result is not None:
                rest = _solve(tuple(sorted((*others, result))), target)
                if rest is not None:
                    return ((left[j], operator, left[i], result), *rest)
    return None
