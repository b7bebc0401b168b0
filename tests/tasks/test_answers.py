"""Answers: found where the field's data sets put them, compared as numbers, words and mathematics."""

import asyncio
import itertools
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treedecode.tasks import equivalence, math_process
from treedecode.tasks.answers import (
    after_hashes,
    boxed,
    classes,
    equivalence_backend,
    equivalent,
    extract_answer,
    last_number,
    normalize,
    stated,
)

GSM8K = "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is <<48+24=72>>72 in all.\n#### 72"


@pytest.fixture
def without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    caches = (equivalence._math_verify, equivalence._equal_as_math)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def math_verify():
    return pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GSM8K, "72"),
        ("#### 5\nWait, no.\n#### 1,200 \n", "1,200"),
        ("####7", "7"),
        ("#### \n", None),
        ("### 5", None),
        ("", None),
    ],
)
def test_after_hashes(text, found):
    assert after_hashes(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1}, no, \fbox{ 2 }", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 3$.", "3"),
        (r"\boxed{8} then \boxed{\frac{1}{2}", "8"),
        (r"\boxed{}", None),
        (r"\boxedx{4}", None),
        ("boxed{4}", None),
    ],
)
def test_boxed(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 18.", "18"),
        ("So the final answer is: **$3.50**.", "$3.50"),
        ("The answer is 5. Wait. The answer is (B).", "(B)"),
        ("The answer is 1,234 apples and more", "1,234"),
        ("Answer: Evelyn\nNext", "Evelyn"),
        (r"the answer is \frac{1}{2}", r"\frac{1}{2}"),
        ("the answers are many", None),
    ],
)
def test_stated(text, found):
    assert stated(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from 5 - 3 to -2.", "-2"),
        ("5-3", "3"),
        ("f(2)-7", "7"),
        ("it costs $1,234.50 now", "$1,234.50"),
        ("with probability 3/4.", "3/4"),
        ("about .5 or 40%", "40%"),
        ("step2 of x1", None),
    ],
)
def test_last_number(text, found):
    assert last_number(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and the answer is 2, or 3" + "\n#### 4", "4"),
        (r"\boxed{1} and the answer is 2, or 3", "1"),
        ("the answer is 2\nor 3", "2"),
        ("or 3", "3"),
        ("nothing", None),
        ("#### Step 1: add\n" + r"\boxed{6}", "6"),
        ("#### Evelyn", "Evelyn"),
    ],
)
def test_extraction_takes_the_clearest_mark(text, found):
    assert extract_answer(text) == found


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("1,234.0", "1234"),
        ("$5", "5"),
        (r"\$5.00", "5"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("72.", "72"),
        ("$-0.50$", "-0.5"),
        ("-$5", "-5"),
        ("-0.0", "0"),
        ("+007", "7"),
        ("1{,}234", "1234"),
        (r"\(1\,234\)", "1234"),  # a thin space
        ("**4**", "4"),
        ("12,34", "12,34"),  # no thousands separator, so two numbers
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
        (r"\text{Evelyn}", "evelyn"),
        (r"\left(3, \dfrac{\pi}{2}\right)", r"(3, \frac{\pi}{2})"),
        ("x", "x"),
        ("X", "X"),
    ],
)
def test_normal_forms(answer, number):
    assert normalize(answer) == number


@given(st.text(alphabet="0123456789.,$%-+\\{}()[] xyA*`^textfrac"))
def test_normalising_twice_is_normalising_once(text):
    assert normalize(normalize(text)) == normalize(text)


@given(
    value=st.integers(-(10**25), 10**25),
    digits=st.integers(0, 8),
    zeros=st.integers(0, 3),
    commas=st.booleans(),
    around=st.sampled_from(["{}", "${}", "{}%", "{}.", r"\boxed{{{}}}", "${}$", r"\text{{{}}}", " {} "]),
)
def test_a_number_is_itself_however_it_is_written(value, digits, zeros, commas, around):
    exact = Fraction(value, 10**digits)
    whole, part = divmod(abs(value), 10**digits)
    written = f"{whole:,}" if commas else "0" * zeros + str(whole)
    if digits or zeros:
        written += "." + (f"{part:0{digits}d}" if digits else "") + "0" * zeros
    written = around.format(("-" if value < 0 else "") + written)
    inner = boxed(written) or written
    assert Fraction(normalize(inner)) == exact


@given(st.lists(st.integers(-30, 30), min_size=2, max_size=2))
def test_different_numbers_differ(pair):
    assert equivalent(str(pair[0]), f"{pair[1]}.0") == (pair[0] == pair[1])


def test_words_are_not_products_of_letters():
    assert equivalent("Yes.", "yes")
    assert not equivalent("no", "on")
    assert not equivalent("listen", "silent")
    assert not equivalent("the cat", "the act")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("2/4", r"\dfrac12", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("p - q", "-q+p", True),
        ("(1,2)", "( 1, 2 )", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("x=5", "5", True),
        (r"(-\infty,5)", "x<5", True),
        ("50%", "0.5", False),
        ("x+1", "x+2", False),
        ("[1,2]", "(1,2)", False),
        ("A", "B", False),
    ],
)
def test_equivalence_as_mathematics(math_verify, first, second, same):
    assert equivalence_backend().startswith("math-verify 0.")
    assert equivalent(first, second) == equivalent(second, first) == same


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "9**9**9**9", "1000000!", r"\prod_{n=1}^{10000000} n", "(10^{999})^{999}", "10^{9*9*999}"],
)
def test_expressions_without_a_bound_are_compared_as_text(math_verify, answer, monkeypatch):
    monkeypatch.setattr(math_process, "are_equal", lambda *args: pytest.fail("evaluated"))
    assert not equivalent(answer, "1")
    assert equivalent(answer, f"${answer}$.")


def test_mathematics_in_other_threads(math_verify):
    equivalence._equal_as_math.cache_clear()
    found = []
    thread = threading.Thread(target=lambda: found.append(equivalent("3/7", r"\frac{6}{14}")))
    thread.start()
    thread.join()
    assert found == [True]
    assert asyncio.run(asyncio.to_thread(equivalent, "x+y", "y+x"))


def test_without_math_verify_comparison_is_exact_and_says_so(without_math_verify):
    assert equivalence_backend() == "exact (math-verify is not installed; pip install 'math-verify[antlr4_13_2]')"
    assert equivalent("$1,000", "1000.0")
    assert equivalent("1/2", "0.5")
    assert not equivalent("x+1", "1+x")


def test_classes_are_numbered_by_first_appearance():
    found = classes(["5", None, "7.0", "$5", "7", "five"])
    assert (found.tolist(), found.dtype) == ([0, -1, 1, 0, 1, 2], np.int64)
    assert classes([]).tolist() == []
    assert classes([None]).tolist() == [-1]


@given(st.permutations(["1", "1.0", "$1", "2", "2.00", "x", None, "no"]))
def test_classes_do_not_depend_on_the_order(answers_in_some_order):
    found = classes(answers_in_some_order)
    expected = {"1": "1", "1.0": "1", "$1": "1", "2": "2", "2.00": "2", "x": "x", "no": "no"}
    for (a, i), (b, j) in itertools.combinations(zip(answers_in_some_order, found, strict=True), 2):
        if a is None or b is None:
            assert -1 in (i, j)
        else:
            assert (i == j) == (expected[a] == expected[b])


@given(st.lists(st.integers(0, 40), max_size=60), st.randoms())
def test_classes_compare_little(values, random):
    calls = []

    def same(a, b):
        calls.append((a, b))
        return int(a) % 4 == int(b) % 4

    texts = [str(value) for value in values]
    found = classes(texts, same)
    assert len(calls) <= 4 * len(set(values))
    shuffled = list(range(len(texts)))
    random.shuffle(shuffled)
    again = classes([texts[i] for i in shuffled], same)
    assert len(set(zip(found[shuffled].tolist(), again.tolist(), strict=True))) == len(set(found.tolist()))


def test_classes_of_what_is_not_transitive_do_not_depend_on_the_order_either():
    def near(a, b):
        return abs(int(a) - int(b)) <= 1

    partitions = set()
    for order in itertools.permutations("1234"):
        found = classes(order, near)
        partitions.add(frozenset(frozenset(a for a, i in zip(order, found, strict=True) if i == k) for k in set(found)))
    assert len(partitions) == 1
