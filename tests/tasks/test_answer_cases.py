"""Answers as models write them, and pairs of answers that are or are not the same.

`golden/answers.jsonl` has texts and what their answer is (null: none); `golden/equivalence.jsonl` has pairs. They were
written by hand, in part after public bug reports of evaluation libraries.
"""

import json
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from treedecode.tasks import equivalence, math_process
from treedecode.tasks.answers import boxed, classes, equivalent, extract_answer, stated
from treedecode.tasks.numbers import plain, value_of

GOLDEN = Path(__file__).parents[1] / "golden"


def rows(name):
    with open(GOLDEN / name, encoding="utf-8") as file:
        return [tuple(json.loads(line).values()) for line in file]


@pytest.mark.parametrize(("text", "answer"), rows("answers.jsonl"))
def test_answer_of_a_text(text, answer):
    result = extract_answer(text)
    assert (result is None) == (answer is None)
    assert answer is None or equivalent(result, answer)


@pytest.mark.parametrize(("first", "second", "same"), rows("equivalence.jsonl"))
def test_same_answers(first, second, same):
    assert equivalent(first, second) == equivalent(second, first) == same


def test_votes_for_one_number_count_together():
    texts = ["#### 18", "The answer is 18 dollars.", r"\boxed{\$18.00}", "so 18", "#### 17"]
    assert classes([extract_answer(text) for text in texts]).tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", "1234.5"), ("1.234,5", "1234.5"), ("1.234.567", "1234567"), ("1 234 567", "1234567"),
        ("12,34,567", "1234567"), ("1.234", "1.234"), ("-$5", "-5"), ("$-5", "-5"), ("5 %", "5"), ("2 1/2", "5/2"),
        (r"-2\frac{1}{2}", "-5/2"), (r"\dfrac12", "1/2"), ("1.5e-3", "0.0015"), (r"2 \times 10^{3}", "2000"),
        ("3/0", None), ("--5", None), ("5 x", None), ("", None), ("1e999999999", None), ("٣٫٥", "3.5"),
        ("１２", "12"),
    ],
)  # fmt: skip
def test_value_of_a_number(text, value):
    assert value_of(plain(text)) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_comparison_ends_in_time_in_every_thread(monkeypatch, in_thread):
    pytest.importorskip("math_verify")
    equivalent("x+1", "1+x")  # starts the process
    monkeypatch.setattr(math_process, "TIMEOUT", 1.0)
    monkeypatch.setattr(equivalence, "_MAX_POWER", 10**9)
    equivalence._equal_as_math.cache_clear()
    results = []

    def compare():
        begin = time.monotonic()
        results.append(equivalent(f"(x+1)^{{{4000 + in_thread}}}", f"(x+y)^{{{4001 + in_thread}}} + 1"))
        results.append(time.monotonic() - begin)

    if in_thread:
        thread = threading.Thread(target=compare)
        thread.start()
        thread.join(30)
    else:
        compare()
    assert results[0] is False
    assert results[1] < 20
    assert equivalent("y+2", "2+y")  # by another process, if that one was ended


def test_a_process_that_dies_is_replaced():
    pytest.importorskip("math_verify")
    assert math_process.are_equal("x+3", "3+x")
    math_process._process.kill()
    math_process._process.wait()
    math_process.are_equal("x+4", "4+x")  # notices it
    assert math_process.are_equal("x+5", "5+x")


@pytest.mark.parametrize(
    ("function", "unit"),
    [
        (boxed, r"\boxed{"), (boxed, r"\boxed{{"), (boxed, "{"), (boxed, r"\boxed "), (stated, "the answer is "),
        (stated, "answer: "), (extract_answer, "#### "), (extract_answer, "####\n"), (extract_answer, "<think>"),
        (extract_answer, "\nQ"), (extract_answer, "<|"), (extract_answer, "1,"), (extract_answer, "1 "),
        (extract_answer, "1."), (extract_answer, "-"), (extract_answer, "answer "), (extract_answer, "$"),
        (extract_answer, "1/"), (extract_answer, "1 1/"), (extract_answer, "("),
    ],
)  # fmt: skip
def test_extraction_takes_linear_time(function, unit):
    def seconds(count):
        begin = time.perf_counter()
        function(unit * count)
        return time.perf_counter() - begin

    # Quadratic time would be 16 times as long for 4 times the text.
    fastest = [min(seconds(count) for _ in range(3)) for count in (2000, 8000)]
    assert fastest[1] < 9 * fastest[0] + 0.02
