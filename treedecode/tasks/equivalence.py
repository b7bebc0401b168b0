"""Tells which answers are the same: as text, as numbers with units, as lists of such, or as mathematics.

Numbers are compared exactly, and lists item by item. What is left is decided by `math-verify` in a process of its own,
so that a comparison ends in time in every thread.
"""

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from treedecode.tasks import math_process
from treedecode.tasks.numbers import ascii_digits, leading_number, plain, value_of

_PLAIN = re.compile(r"[$€£]?\s*([-+]?)\s*[$€£]?\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*))(?:\.([0-9]*))?\s*%?", re.ASCII)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SPELLINGS = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\s+"), " "),
)
_FUNCTIONS = frozenset(("sqrt", "frac", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan"))
_MAX_MATH_LEN = 200  # characters; longer ones are prose, or take sympy longer than they are worth
_MAX_POWER = 10_000
_UNIT = re.compile(
    r"\s*(?:(?P<wrapped>\\(?:text|mbox|mathrm|textrm|textbf|rm)\s*\{\s*[^{}]*\}|\^\s*\{?\\circ\}?|\\degree|\u00b0)"
    r"\s*(?P<more>.*)"
    r"|(?P<words>[^\W\d_][^\W\d_.]*\.?(?:[\s/*^.-]+(?:[^\W\d_]+|[23]))*))"
)


def _group(text: str, begin: int) -> str | None:
    """Returns the braced group that begins at `begin`, or the word there; None for a group that does not end."""
    while begin < len(text) and text[begin] == " ":
        begin += 1
    if begin == len(text) or text[begin] != "{":
        return re.compile(r"[^\s$]*").match(text, begin).group()  # type: ignore[union-attr]
    depth, i = 0, begin
    while i < len(text):
        if text[i] == "\\":  # an escaped brace is not one
            i += 1
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[begin + 1 : i]
        i += 1
    return None


@lru_cache(maxsize=65536)
def normalize(answer: str) -> str:
    r"""Returns the form in which equal answers are equal strings; idempotent.

    It removes math delimiters, `\text{}`, `\left`, spacing commands and a trailing period. A number loses thousands
    separators, a currency or percent sign (a unit here: "50%" is 50, not 0.5) and zeros that carry nothing:
    "$1,234.00" is "1234". Words ("Yes") are compared without case.
    """
    text, before = ascii_digits(answer).strip(), None
    while text != before:
        before = text
        for pattern, replacement in _SPELLINGS:
            text = pattern.sub(replacement, text)
        text = _unwrapped(text.strip())
    number = _plain_number(text)
    if number is not None:
        return number
    return text.casefold() if _is_words(text) else text


def _unwrapped(text: str) -> str:
    text = re.sub(r"^,(?=[0-9])", "", text)
    if text.endswith(".") and not text.endswith(".."):
        return text[:-1].strip()
    for begin, end in _WRAPPERS:
        inner = text[len(begin) : -len(end)]
        if len(text) > len(begin + end) and text.startswith(begin) and text.endswith(end) and end not in inner:
            return inner.strip()
    named = re.match(r"\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)", text)
    if named and (inner := _group(text, named.end()) or "") and named.end() + len(inner) + 2 == len(text):
        return inner.strip()
    return text


def _plain_number(text: str) -> str | None:
    """Returns the shortest form of the decimal number `text`; None if it is no number."""
    match = _PLAIN.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").lstrip("0") or "0"
    part = (match[3] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number


def _is_words(text: str) -> bool:
    """Returns whether letters spell words; as mathematics they would be products of variables, "no" equal to "on"."""
    if re.fullmatch(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*", text):
        return True
    runs = re.findall(r"(?<!\\)\b[^\W\d_]{4,}", re.sub(r"\\[a-zA-Z]+", " ", text))
    return any(run not in _FUNCTIONS for run in runs)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, str]:
    """Returns the module `math_verify` or None, and its version or why there is none."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        if error.name == "math_verify":
            return None, "math-verify is not installed; pip install 'math-verify[antlr4_13_2]'"
        return None, f"math-verify cannot be imported: {error}"
    except Exception as error:  # the parser's runtime raises various errors when its version is another
        return None, f"math-verify cannot be imported: {type(error).__name__}: {error}"
    return math_verify, f"math-verify {importlib.metadata.version('math-verify')}"


def equivalence_backend() -> str:
    """Names the method by which `equivalent` compares: "math-verify <version>", or "exact" and why."""
    module, version_or_reason = _math_verify()
    return version_or_reason if module is not None else f"exact ({version_or_reason})"


def equivalent(first: str, second: str) -> bool:
    r"""Returns whether two answers are the same: as normalised text, numbers, lists, or mathematics.

    Symmetric. Numbers are compared exactly, mixed numbers and fractions too. A unit counts where both have one: "12" is
    "12 feet", but "12 m" is not "12 s". Lists are compared item by item, sets in any order; a set is no tuple. Prose,
    and expressions whose evaluation has no visible bound (towers of powers, factorials, sums), are compared as text
    alone. Mathematics that is not decided in seconds is taken for different.
    """
    a, b = sorted((normalize(first), normalize(second)))
    if a == b:
        return True
    if not a or not b:
        return False
    quantities = _quantity(a), _quantity(b)
    if quantities[0] is not None and quantities[1] is not None:
        return _same_quantity(quantities[0], quantities[1])
    lists = _list(a), _list(b)
    if lists[0] is not None and lists[1] is not None:
        return _same_list(lists[0], lists[1])
    if len(a) == len(b) == 1:
        return False  # letters, whose case counts
    if _math_verify()[0] is None or not (_is_math(a) and _is_math(b)):
        return False
    return _equal_as_math(a, b)


class Quantity(NamedTuple):
    """A number, and the unit behind it: "" for none."""

    value: Fraction
    unit: str
    is_certain: bool  # that the unit is none of mathematics, as a single letter could be


@lru_cache(maxsize=65536)
def _quantity(text: str) -> Quantity | None:
    """Reads a number with or without a unit; None for any other text."""
    text = plain(text)
    value = value_of(text)
    if value is not None:
        return Quantity(value, "", True)
    number = leading_number(text)
    if number is None or (value := value_of(number)) is None:
        return None
    unit = _UNIT.fullmatch(text, len(number))
    if unit is None:
        return None
    if unit["words"] is not None:
        words = unit["words"].strip()
        if len(words) == 1 and len(number) == unit.start("words"):
            return None  # "5x"
        return Quantity(value, _unit_name(words), len(words) > 1)
    return Quantity(value, _unit_name(unit["wrapped"] + unit["more"]), True)


def _unit_name(unit: str) -> str:
    """Returns a unit in its simplest spelling."""
    words = re.sub(r"\\[a-zA-Z]+|[{}^.]", " ", unit.replace(r"\circ", "degree ").replace("\u00b0", "degree ")).split()
    if len(words) > 1 or (len(words[0:1]) and len(words[0]) > 1):
        words = [word.casefold() for word in words]
    words = [word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words]
    return " ".join(words)


def _same_quantity(a: Quantity, b: Quantity) -> bool:
    if a.value != b.value:
        return False
    if a.unit and b.unit:
        return a.unit == b.unit
    return a.is_certain and b.is_certain


@lru_cache(maxsize=65536)
def _list(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Reads a list as its brackets ("" for none) and items; None for a text without a comma outside of brackets."""
    text = re.sub(r"\\([{}])", r"\1", text)
    brackets = ""
    if re.fullmatch(r"[{(\[].*[})\]]", text, re.DOTALL) and _closes_at_end(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    items, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(text[begin:i].strip())
            begin = i + 1
    items.append(text[begin:].strip())
    if (brackets != "{}" and len(items) == 1) or not all(items):
        return None
    return brackets, tuple(items)


def _closes_at_end(text: str) -> bool:
    """Returns whether the bracket that a text begins with is closed by its last character."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _same_list(a: tuple[str, tuple[str, ...]], b: tuple[str, tuple[str, ...]]) -> bool:
    brackets = {a[0], b[0]}
    if len(brackets) == 2 and brackets not in ({"", "()"}, {"", "{}"}):
        return False
    if "{}" not in brackets:
        return len(a[1]) == len(b[1]) and all(map(equivalent, a[1], b[1]))
    return all(any(equivalent(x, y) for y in b[1]) for x in a[1]) and all(
        any(equivalent(x, y) for x in a[1]) for y in b[1]
    )


def _is_math(text: str) -> bool:
    if len(text) > _MAX_MATH_LEN or "$" in text or _is_words(text):
        return False
    if re.search(r"!|\\(?:sum|prod|lim|o?i+nt)(?![a-z])", text):
        return False
    power = 1
    for match in re.finditer(r"\^|\*\*", text):
        exponent = _group(text, match.end())
        if exponent is None or "^" in exponent or "**" in exponent:
            return False
        for factor in re.findall(r"[0-9]+", exponent):
            power *= max(1, int(factor[:9]))
    return power <= _MAX_POWER


@lru_cache(maxsize=65536)
def _equal_as_math(a: str, b: str) -> bool:
    return math_process.are_equal(a, b)


def classes(answers: Sequence[str | None], same: Callable[[str, str], bool] = equivalent) -> np.ndarray:
    """Groups answers into classes of equivalent ones.

    Each different answer is compared with one answer of each class. The order of the comparisons does not depend on
    that of `answers`, so neither do the classes.

    Args:
        answers: None belongs to no class.
        same: tells whether two answers are the same.

    Returns:
        `[n]` int64, numbered by first appearance; -1 for None.
    """
    representatives: list[str] = []
    class_of: dict[str, int] = {}
    for answer in sorted({answer for answer in answers if answer is not None}):
        matches = (i for i, other in enumerate(representatives) if same(other, answer))
        class_of[answer] = next(matches, len(representatives))
        if class_of[answer] == len(representatives):
            representatives.append(answer)
    numbers: dict[int, int] = {}
    ids = [-1 if answer is None else numbers.setdefault(class_of[answer], len(numbers)) for answer in answers]
    return np.array(ids, np.int64)
