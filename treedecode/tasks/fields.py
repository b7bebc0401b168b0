"""Fields: finds the question, the answer and the id in the rows of problem files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treedecode.tasks.answers import after_hashes, boxed
from treedecode.tasks.base import unicode

# GSM8K, MGSM and GSM-Symbolic: question, answer. MATH: problem, solution; MATH-500 also answer. SVAMP: Body, Question,
# Answer. The first that a row has counts.
_QUESTIONS = ("question", "problem", "Question")
_ANSWERS = ("answer", "answer_number", "Answer")  # MGSM's test split has answer_number, and an answer that is null
_IDS = ("id", "unique_id", "ID")
_CONTEXT = "Body"  # of SVAMP: what the question is about
_INSTANCE = "instance"  # of GSM-Symbolic: tells problems apart that have the same id
_SOLUTION = "solution"  # of MATH: the worked solution


@dataclass(frozen=True)
class Row:
    """A problem as a file has it.

    Attributes:
        id: None = the row has none.
        answer, solution: None = the row has none; the solution marks the answer.
    """

    id: str | None
    question: str
    answer: str | None
    solution: str | None
    group: str | None


@dataclass(frozen=True)
class Fields:
    """Names the fields of a file's rows.

    Args:
        question, answer, id: None = by the names that known data sets have: GSM8K (2110.14168), MATH (2103.03874) and
            MATH-500, SVAMP (2103.07191), MGSM (2210.03057), GSM-Symbolic (2410.05229).
    """

    question: str | None = None
    answer: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        for name in ("question", "answer", "id"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}_field: expected the name of a field, got {value!r}")

    def read(self, row: Any) -> Row:
        """Reads a row.

        Raises:
            ValueError: it is no object, lacks its question, or has an answer without a mark.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f'expected an object {{"question": ..., "answer": ...}}, got {type(row).__name__}')
        answer, solution = self._answer(row)
        return Row(self._id(row), self._question(row), answer, solution, _optional(row, "group"))

    def _question(self, row: Mapping[str, Any]) -> str:
        if self.question is not None:
            _require(row, self.question, "question_field")
            return _text(row, self.question)
        name = next((name for name in _QUESTIONS if name in row), None)
        if name is None:
            raise ValueError(f"question: expected a text, got None; {_fields_of(row)}, and question_field names it")
        question = _text(row, name)
        return f"{_text(row, _CONTEXT)} {question}" if name == "Question" and _CONTEXT in row else question

    def _answer(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        if self.answer is not None:
            _require(row, self.answer, "answer_field")
        names = _ANSWERS if self.answer is None else (self.answer,)
        name = next((name for name in names if row.get(name) is not None), None)
        worked = row.get(_SOLUTION) if self.answer is None else None
        if name is None:
            if not isinstance(worked, str) or not worked.strip():
                return None, None
            name, worked = _SOLUTION, None
        text = _text(row, name)
        marked = _marked(text)
        if marked is not None:
            return marked, text
        if "\n" in text or "####" in text or name == _SOLUTION:
            raise ValueError(f"{name}: expected the result after #### or in \\boxed{{}}, found neither")
        has_worked = isinstance(worked, str) and _marked(worked) is not None
        return text, _text(row, _SOLUTION) if has_worked else f"#### {text}"

    def _id(self, row: Mapping[str, Any]) -> str | None:
        if self.id is not None:
            _require(row, self.id, "id_field")
            return _text(row, self.id)
        value = next((_text(row, name) for name in _IDS if row.get(name) is not None), None)
        return value if value is None or row.get(_INSTANCE) is None else f"{value}-{_text(row, _INSTANCE)}"


def _marked(text: str) -> str | None:
    return after_hashes(text) or boxed(text)


def _require(row: Mapping[str, Any], name: str, argument: str) -> None:
    if name not in row:
        raise ValueError(f"{argument}: there is no {name!r}; {_fields_of(row)}")


def _fields_of(row: Mapping[str, Any]) -> str:
    return f"the fields are {', '.join(map(json.dumps, row))}" if row else "there are no fields"


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else _text(row, name)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a text, got {value!r}")
    return unicode(value, name).strip()
