"""Finds answers in texts, and tells which answers are the same.

Equivalence is exact after `normalize`, then by `math-verify` (extra `math`), which parses both answers and compares
them as mathematics; `equivalence_backend` says whether it is in use.
"""

import importlib.metadata
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

# Digits with or without thousands separators, a decimal part or a denominator, a currency or percent sign.
_NUMBER = r"(?<![\w.])[$€£]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|\.[0-9]+)%?"
# A minus after an operand subtracts, so the last number of "5-3" is 3.
_SIGNED = re.compile(rf"(?:(?<![\w)\]}}.])[-−])?{_NUMBER}")
_STATED = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[\s:*]*((?:[^\n.]|\.(?=\S))+)", re.IGNORECASE)
_PLAIN = re.compile(r"[$€£]?\s*([-+]?)\s*[$€£]?\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*))(?:\.([0-9]*))?\s*%?", re.ASCII)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SPELLINGS = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile("−"), "-"),
    (re.compile(r"\s+"), " "),
)
_FUNCTIONS = frozenset(("sqrt", "frac", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan"))
_MAX_MATH_LEN = 200  # characters; longer ones are prose, or take sympy longer than they are worth
_MAX_POWER = 10_000
_TIMEOUT = 5  # seconds


def after_hashes(text: str) -> str | None:
    """Returns the rest of the line after the last `####`, as GSM8K marks an answer (2110.14168); None without one."""
    marked = re.findall(r"####[ \t]*([^\n]*)", text)
    return next((line.strip() for line in reversed(marked) if line.strip()), None)


def boxed(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{}` or `\fbox{}`, as MATH marks an answer (2103.03874)."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", text))):
        content = _group(text, match.end())
        if content is not None and content.strip():
            return content.strip()
    return None


def stated(text: str) -> str | None:
    """Returns the rest of the sentence after the last "the answer is" of a chain of thought (2201.11903), else None.

    Of a number with words behind it ("5 apples") it returns the number.
    """
    statements = _STATED.findall(text)
    if not statements:
        return None
    phrase = statements[-1].strip().strip("*").strip()
    counted = re.match(rf"(-?{_NUMBER})\s+[^\W\d_]", phrase)
    return (counted.group(1) if counted else phrase) or None


def last_number(text: str) -> str | None:
    """Returns the last number of a text as it is written, with sign, separators and `$` or `%`; None without one."""
    numbers = _SIGNED.findall(text)
    return numbers[-1] if numbers else None


def is_heading(marked: str) -> bool:
    """Returns whether the text after `####` reads like a Markdown heading ("Step 2: add them up"), not an answer."""
    return _is_words(marked)


def extract_answer(text: str) -> str | None:
    r"""Returns the answer of a text: after `####`, else in `\boxed{}`, else stated, else the last number; else None.

    Chat models write headings with `####`: words there give way to a `\boxed{}`.
    """
    marked, box = after_hashes(text), boxed(text)
    if marked is not None and (box is None or not is_heading(marked)):
        return marked
    return next((answer for answer in (box, stated(text), last_number(text)) if answer is not None), None)


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
    text, before = answer.strip(), None
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
            return None, "math-verify is not installed; pip install 'treedecode[math]'"
        return None, f"math-verify cannot be imported: {error}"
    except Exception as error:  # the parser's runtime raises various errors when its version is another
        return None, f"math-verify cannot be imported: {type(error).__name__}: {error}"
    return math_verify, f"math-verify {importlib.metadata.version('math-verify')}"


def equivalence_backend() -> str:
    """Names the method by which `equivalent` compares: "math-verify <version>", or "exact" and why."""
    module, version_or_reason = _math_verify()
    return version_or_reason if module is not None else f"exact ({version_or_reason})"


def equivalent(first: str, second: str) -> bool:
    r"""Returns whether two answers are the same: as normalised text, or as mathematics ("1/2", "0.5" and "\frac12").

    Symmetric. Two decimal numbers are compared exactly. Prose, and expressions whose evaluation has no visible bound
    (towers of powers, factorials, sums), are compared as text alone. In the main thread SIGALRM ends a comparison after
    5 seconds; in other threads, where signals do not work, the bounds on expressions limit it.
    """
    a, b = sorted((normalize(first), normalize(second)))
    if a == b:
        return True
    if not a or not b or (_plain_number(a) is not None and _plain_number(b) is not None):
        return False
    if _math_verify()[0] is None or not (_is_math(a) and _is_math(b)):
        return False
    return _equal_as_math(a, b)


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


def _limit() -> int | None:
    return _TIMEOUT if threading.current_thread() is threading.main_thread() else None


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    return _math_verify()[0].parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=_limit())


@lru_cache(maxsize=65536)
def _equal_as_math(a: str, b: str) -> bool:
    first, second = _parsed(a), _parsed(b)
    if not first or not second:
        return False
    # math-verify takes "x = 5" for 5 where the reference is 5, and an interval for an inequality, but not the reverse.
    verify = _math_verify()[0].verify
    return any(verify(gold, given, timeout_seconds=_limit()) for gold, given in ((first, second), (second, first)))


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
