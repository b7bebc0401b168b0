"""The countdown task: its generator against exhaustive search, its checker against cheats, splits, canonical forms."""

import ast
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treedecode.tasks import Problem, Task
from treedecode.tasks.countdown import SPLITS, Countdown, combine, prompt_of, solution_of, solve, split_of

TASK = Countdown()


def problem(numbers, target):
    return Problem("p", prompt_of(numbers, target), data={"numbers": numbers, "target": target})


def by_value(expression):
    """Evaluates an expression by Python's parser; returns its value and its numbers."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value), [node.value]
        (left, first), (right, second) = walk(node.left), walk(node.right)
        value = {
            ast.Add: lambda: left + right,
            ast.Sub: lambda: left - right,
            ast.Mult: lambda: left * right,
            ast.Div: lambda: left / right,
        }[type(node.op)]()
        return value, first + second

    value, numbers = walk(ast.parse(expression, mode="eval").body)
    return value, sorted(numbers)


# -- generator --


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_derivations_keep_the_rules_and_reach_the_target(count):
    stream = TASK.derivations(count, split="train", seed=3)
    seen = Counter()
    for _ in range(500):
        numbers, steps = next(stream)
        assert len(numbers) == count
        assert list(numbers) == sorted(numbers)
        left = Counter(numbers)
        assert min(left) >= 1
        assert max(left) <= TASK.max_number
        for first, operator, second, result in steps:
            left.subtract([first, second])
            assert min(left.values()) >= 0
            left[result] += 1
            left = +left
            assert result == {"+": first + second, "-": first - second, "*": first * second}.get(
                operator, Fraction(first, second if operator == "/" else 1)
            )
            assert 1 <= result <= TASK.max_value
            seen[operator] += 1
        assert list(left.elements()) == [steps[-1][3]]
        assert TASK.min_target <= steps[-1][3] <= TASK.max_target
    assert set(seen) == set("+-*/")


def test_problems_are_distinct_mixed_seeded_and_extend_each_other():
    problems = TASK.problems(300, split="test", seed=5)
    assert len({problem.id for problem in problems}) == 300
    assert Counter(problem.group for problem in problems) == {"3 numbers": 100, "4 numbers": 100, "5 numbers": 100}
    assert TASK.problems(40, split="test", seed=5) == problems[:40]
    assert {p.id for p in TASK.problems(300, split="test", seed=6)} != {p.id for p in problems}
    first = problems[0].data
    assert problems[0].prompt == f"Use {' '.join(map(str, first['numbers']))} to make {first['target']}\n"


def test_solved_problems_are_right():
    for count in TASK.counts:
        stream = TASK.solved(count)
        for _ in range(200):
            prompt, solution = next(stream)
            numbers = [int(word) for word in prompt.split()[1 : 1 + count]]
            target = int(prompt.split()[-1])
            assert TASK.verify(problem(numbers, target), solution)
            assert TASK.is_final(solution)
    assert [len(prompt.split()) for prompt, _ in TASK.examples(4)] == [7, 8, 9, 7]
    assert TASK.examples(2) == TASK.examples(4)[:2]
    assert len(set(TASK.examples(8))) == 8
    mixed = Countdown(counts=(3, 5, 5)).problems(60)
    assert Counter(problem.group for problem in mixed) == {"3 numbers": 20, "5 numbers": 40}
    assert len({problem.id for problem in mixed}) == 60


def test_misses_ask_for_another_target():
    hits = [pair for pair, _ in zip(TASK.solved(4, misses=0.0), range(1000), strict=False)]
    stream = [pair for pair, _ in zip(TASK.solved(4, misses=0.25), range(1000), strict=False)]
    assert [solution for _, solution in stream] == [solution for _, solution in hits]
    missed = [prompt != hit for (prompt, _), (hit, _) in zip(stream, hits, strict=True)]
    assert 0.15 < np.mean(missed) < 0.3
    for prompt, solution in stream:
        words = prompt.split()
        numbers, target = [int(word) for word in words[1:-3]], int(words[-1])
        assert split_of(numbers, target) == "train"
        assert TASK.verify(problem(numbers, int(solution.split()[-1])), solution)


def test_settings_are_checked():
    for name, value in (("counts", ()), ("counts", (1,)), ("max_number", 0), ("max_value", 1000), ("min_target", 1.5)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Countdown(**{name: value})
    with pytest.raises(ValueError, match="max_target: expected from min_target"):
        Countdown(min_target=50, max_target=40)
    with pytest.raises(ValueError, match="max_value: expected at least max_number"):
        Countdown(max_number=200)
    with pytest.raises(ValueError, match="split: expected one of"):
        TASK.problems(1, split="dev")
    with pytest.raises(ValueError, match="has no test problems of 2 numbers"):
        Countdown(counts=(2,), max_number=1, max_value=20, min_target=10, max_target=20).problems(1)
    with pytest.raises(ValueError, match="split has about"):
        Countdown(counts=(2,), max_number=5, max_value=20, min_target=1, max_target=20).problems(1000, split="train")


def test_it_is_a_task():
    names = [name for name in vars(Task) if not name.startswith("_")] + list(Task.__annotations__)
    assert not [name for name in names if not hasattr(TASK, name)]


# -- splits --


def key_of(numbers, target):
    return tuple(sorted(numbers)), target


def test_splits_are_disjoint():
    """Training texts ask for no problem of another split, in the generators that training and evaluation use."""
    seen = {split: set() for split in SPLITS}
    for count in TASK.counts:
        for seed in (0, 1):
            stream = TASK.solved(count, split="train", seed=seed, misses=seed / 2)
            for prompt, _ in (next(stream) for _ in range(4000)):
                words = prompt.split()
                seen["train"].add(key_of(map(int, words[1:-3]), int(words[-1])))
    for split in SPLITS:
        for seed in (0, 1):
            data = [problem.data for problem in TASK.problems(600, split=split, seed=seed)]
            seen[split] |= {key_of(d["numbers"], d["target"]) for d in data}
    assert all(seen.values())
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


@given(st.lists(st.integers(1, 99), min_size=2, max_size=6), st.integers(1, 999), st.randoms())
def test_a_split_does_not_depend_on_the_order_of_numbers(numbers, target, random):
    shuffled = random.sample(numbers, len(numbers))
    assert split_of(shuffled, target) == split_of(numbers, target)


def test_splits_are_the_same_in_every_process():
    """Python's own hash() of strings differs from process to process."""
    keys = [((3, 5, 7, 25), target) for target in range(10, 110)]
    code = f"from treedecode.tasks.countdown import split_of; print(*[split_of(*key) for key in {keys}])"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == [split_of(*key) for key in keys]
    shares = Counter(split_of((i, i + 1, 2 * i), t) for i in range(1, 50) for t in range(10, 100))
    assert 0.04 < shares["test"] / shares.total() < 0.06
    assert 0.04 < shares["validation"] / shares.total() < 0.06


# -- checker --

GOOD = "25 + 5 = 30, left 3 7 30\n30 - 7 = 23, left 3 23\n23 * 3 = 69, left 69\n"


def test_a_right_solution():
    assert TASK.verify(problem((3, 5, 7, 25), 69), GOOD)
    assert TASK.verify(problem((3, 5, 7, 25), 69), GOOD.removesuffix("\n"))
    assert TASK.verify(problem((25, 3, 7, 5), 69), GOOD.replace("left 3 7 30", "left 30 7 3"))
    assert TASK.extract(GOOD) == "(25 + 5 - 7) * 3"
    assert not TASK.verify(problem((3, 5, 7, 25), 68), GOOD)
    assert not TASK.verify(problem((3, 5, 8, 25), 69), GOOD)
    assert not TASK.verify(problem((3, 5, 7, 7, 25), 69), GOOD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "69",
        "left 69\n",
        "25 + 5 = 30, left 3 7 30\n",  # not all used
        "25 + 5 = 30, left 69\n",  # numbers vanish
        "25 + 5 = 69, left 69\n",
        "25 + 5 = 30, left 3 7 30 69\n",  # a number appears
        "25 + 5 = 30, left 3 7 30\n30 - 7 = 23, left 3 23\n23 * 3 = 70, left 70\n",  # wrong arithmetic
        "25 + 5 = 30, left 3 7 30\n30 - 7 = 23, left 3 23\n23 * 3 = 69, left 3 69\n",  # one used and kept
        "25 + 5 = 30, left 3 7 30\n25 - 7 = 18, left 3 30 18\n",  # one used twice
        "9 * 3 = 27, left 3 27\n27 + 3 = 30, left 30\n",  # not the numbers of the problem
        "62 + 7 = 69, left 69\n",
        "69 * 1 = 69, left 69\n",
        "25 + 5 = 30, left 3 7 30\n\n30 - 7 = 23, left 3 23\n23 * 3 = 69, left 69\n",
        "25 + 5 = 30, left 3 7 30 # 30 - 7 = 23, left 3 23\n23 * 3 = 69, left 69\n",
        "25 + 5 = 030, left 3 7 030\n30 - 7 = 23, left 3 23\n23 * 3 = 69, left 69\n",
        "25 + 5 = 30, left 3 7 30\n30 - 7 = 23, left 3 23\n23 * 3 = ６９, left ６９\n",  # digits of another script
        "3 - 5 = -2, left 7 25 -2\n",
        "5 - 5 = 0, left 3 7 25 0\n",
        "7 / 3 = 2, left 2 5 25\n",  # not exact
        "7 / 0 = 7, left 3 5 25 7\n",
        "25 ** 5 = 9765625, left 3 7 9765625\n",
        "25 + 5 = 30, left 3 7 30\r30 - 7 = 23, left 3 23\r23 * 3 = 69, left 69\r",
        "9" * 5000 + " + 1 = 1, left 1\n",
    ],
)
def test_cheats_are_refused(text):
    assert not TASK.verify(problem((3, 5, 7, 25), 69), text)


def test_an_answer_is_read_whether_or_not_it_is_right():
    """Otherwise a majority vote would be told which answers are wrong."""
    wrong = "25 + 5 = 31, left 3 7 31\n31 - 7 = 24, left 3 24\n24 * 3 = 69, left 69\n"
    assert TASK.extract(wrong) == TASK.extract(GOOD)
    assert TASK.is_final(wrong)
    assert not TASK.verify(problem((3, 5, 7, 25), 69), wrong)
    assert TASK.extract("9 / 2 = 5, left 5\n") == "9 / 2"


def test_what_follows_the_answer_is_not_read():
    assert TASK.verify(problem((3, 5, 7, 25), 69), GOOD + "Use 1 2 to make 3\n")
    assert not TASK.verify(problem((3, 5, 7, 25), 70), GOOD + "69 + 1 = 70, left 70\n")
    assert TASK.extract(GOOD + "69 + 1 = 70, left 70\n") == TASK.extract(GOOD)


def test_when_a_solution_is_final():
    lines = GOOD.splitlines(keepends=True)
    assert not TASK.is_final("")
    assert not TASK.is_final(lines[0])
    assert not TASK.is_final(lines[0] + lines[1] + "23 * 3 = 6")
    assert TASK.is_final(GOOD)
    assert TASK.is_final(GOOD.removesuffix("\n"))
    assert TASK.is_final("25 + 5 = 30, left 3 7\n")  # broken off
    assert not TASK.is_final("25 + 5 = 30, left 3 7")  # not a line yet
    assert not TASK.is_final("25 + 5 = 31, left 3 7 31\n")  # wrong, which only the verifier may tell
    assert TASK.is_final(lines[0] + "\n")
    assert TASK.extract(lines[0]) is None


@given(st.text(alphabet="0123456789+-*/=, left\n", max_size=80))
def test_any_text_is_read_without_error(text):
    TASK.is_final(text)
    assert TASK.extract(text) is None or TASK.is_final(text)
    assert not TASK.verify(problem((3, 5, 7, 25), 69), text)


# -- canonical form --


@st.composite
def derivations(draw):
    count = draw(st.integers(2, 5))
    stream = TASK.derivations(count, split="train", seed=draw(st.integers(0, 10_000)))
    return next(stream)


def all_classes(numbers, target):
    """Finds the canonical forms of all solutions, by exhaustive search over the texts."""
    found = set()

    def search(left, steps):
        if len(left) == 1:
            if left[0] == target:
                found.add(TASK.extract(solution_of(numbers, steps)))
            return
        for i in range(len(left)):
            for j in range(len(left)):
                for operator in "+-*/":
                    result = combine(left[i], operator, left[j]) if i != j else None
                    if result is not None:
                        others = [value for k, value in enumerate(left) if k not in (i, j)]
                        search([*others, result], [*steps, (left[i], operator, left[j], result)])

    search(list(numbers), [])
    return found


@given(derivations())
def test_the_expression_has_the_target_as_value_and_uses_the_numbers(derivation):
    numbers, steps = derivation
    value, used = by_value(TASK.extract(solution_of(numbers, steps)))
    assert (value, used) == (steps[-1][3], list(numbers))


@given(derivations(), st.randoms())
def test_order_and_swapped_operands_make_no_difference(derivation, random):
    numbers, steps = derivation
    swapped = [(b, op, a, r) if op in "+*" and random.random() < 0.5 else (a, op, b, r) for a, op, b, r in steps]
    text = solution_of(numbers, swapped)
    lines = [line.split("left ") for line in text.splitlines()]
    shuffled = [f"{head}left {' '.join(random.sample(tail.split(), len(tail.split())))}\n" for head, tail in lines]
    assert TASK.extract("".join(shuffled)) == TASK.extract(solution_of(numbers, steps))


@pytest.mark.parametrize(
    ("numbers", "orders"),
    [
        (
            (2, 3, 4, 5),
            [[(2, "+", 3, 5), (4, "+", 5, 9), (9, "+", 5, 14)], [(5, "+", 4, 9), (9, "+", 3, 12), (12, "+", 2, 14)]],
        ),
        (
            (3, 10, 20),
            [
                [(10, "-", 3, 7), (20, "-", 7, 13)],
                [(20, "-", 10, 10), (10, "+", 3, 13)],
                [(20, "+", 3, 23), (23, "-", 10, 13)],
            ],
        ),
        (
            (2, 6, 12),
            [[(6, "/", 2, 3), (12, "/", 3, 4)], [(12, "/", 6, 2), (2, "*", 2, 4)], [(12, "*", 2, 24), (24, "/", 6, 4)]],
        ),
    ],
)
def test_groupings_that_agree_come_to_one_expression(numbers, orders):
    assert len({TASK.extract(solution_of(numbers, steps)) for steps in orders}) == 1


def test_what_differs_by_more_than_order_stays_apart():
    assert all_classes((2, 3, 5), 25) == {"(2 + 3) * 5"}
    assert all_classes((1, 3, 4), 12) == {"1 * 3 * 4", "3 * 4 / 1"}
    assert all_classes((2, 2, 8), 12) == {"2 + 2 + 8", "2 * 2 + 8", "(8 - 2) * 2"}
    assert all_classes((3, 3, 8, 8), 24) == set()  # 8 / (3 - 8 / 3) passes through a fraction


# -- solver --


def test_the_solver_finds_a_solution_where_there_is_one():
    rng = np.random.default_rng(0)
    solved = 0
    for _ in range(40):
        numbers = sorted(rng.integers(1, 13, rng.integers(2, 5)).tolist())
        target = int(rng.integers(1, 60))
        text = solve(numbers, target)
        assert (text is not None) == bool(all_classes(numbers, target))
        assert text is None or TASK.verify(problem(numbers, target), text)
        solved += text is not None
    assert 5 < solved < 35


@settings(max_examples=30)
@given(derivations())
def test_generated_problems_have_solutions(derivation):
    numbers, steps = derivation
    assert TASK.verify(problem(numbers, steps[-1][3]), solve(numbers, steps[-1][3]))
