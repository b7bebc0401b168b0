"""Reads problems from JSONL files in the format of GSM8K (2110.14168) and MATH (2103.03874)."""

import json
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treedecode.common.validation import positive_int
from treedecode.tasks.answers import after_hashes, boxed, equivalent, extract_answer, is_heading
from treedecode.tasks.base import Problem, unicode

PROMPT = "Question: {question}\nAnswer:"
_NEXT_QUESTION = "\nQuestion:"  # a base model goes on with a problem of its own after the answer


class Jsonl:
    r"""The problems of JSONL files, one a line: `{"question": ..., "answer": ...}`, and maybe `"id"` and `"group"`.

    The answer is a worked solution that marks its result with `####` or `\boxed{}`, or, on one line and without a mark,
    the result itself.

    Args:
        path: the file of the split "test".
        train, validation: files of the other splits. Worked examples come from `train`.
        max_step_tokens, max_new_tokens: as in `Task`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a problem; names file and line.
    """

    stop = "\n"
    end: tuple[str, ...] = (_NEXT_QUESTION,)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        train: str | os.PathLike[str] | None = None,
        validation: str | os.PathLike[str] | None = None,
        max_step_tokens: int = 128,
        max_new_tokens: int = 512,
    ) -> None:
        self.name = os.fspath(path)
        self.max_step_tokens = positive_int("max_step_tokens", max_step_tokens)
        self.max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
        files = {"test": path, "train": train, "validation": validation}
        self._files = {split: Path(file) for split, file in files.items() if file is not None}
        self._splits = {
            split: [replace(problem, task=self) for problem in read_problems(file)]
            for split, file in self._files.items()
        }

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Draws problems of a file by `seed`, and returns them in the file's order.

        Raises:
            ValueError: the split has no file, or its file has fewer problems.
        """
        problems = self._split(split)
        if not 0 <= num_problems <= len(problems):
            raise ValueError(f"num_problems: {self._files[split]} has {len(problems)}, got {num_problems}")
        return [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), num_problems))]

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Returns the first `count` problems of the training file with their solutions.

        Raises:
            ValueError: there is no training file, or it has fewer.
        """
        problems = self._split("train")
        if count > len(problems):
            raise ValueError(f"count: {self._files['train']} has {len(problems)} problems, got {count}")
        return [(problem.prompt, " " + problem.data["solution"]) for problem in problems[:count]]

    def extract(self, text: str) -> str | None:
        """Returns the answer that `extract_answer` finds before the model begins another question."""
        return extract_answer(text.partition(_NEXT_QUESTION)[0])

    def equivalent(self, first: str, second: str) -> bool:
        """Compares answers as `treedecode.verify.equivalent` does."""
        return equivalent(first, second)

    def is_final(self, text: str) -> bool:
        """Returns whether a line that marks the answer is complete, or the model has begun another question."""
        if _NEXT_QUESTION in text:
            return True
        complete_lines = text.rpartition("\n")[0]
        marked = after_hashes(complete_lines)
        return (marked is not None and not is_heading(marked)) or boxed(complete_lines) is not None

    def verify(self, problem: Problem, text: str) -> bool:
        """Returns whether the answer of a solution is that of the file."""
        answer = self.extract(text)
        return answer is not None and problem.answer is not None and equivalent(answer, problem.answer)

    def _split(self, split: str) -> list[Problem]:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split: expected 'train', 'validation' or 'test', got {split!r}")
        if split not in self._splits:
            splits = " and ".join(map(repr, self._splits))
            raise ValueError(f"split: {self.name} is {splits} alone; Jsonl({self.name!r}, {split}=FILE) adds {split!r}")
        return self._splits[split]


def read_problems(path: Path) -> list[Problem]:
    """Reads the problems of a JSONL file; blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a problem, or an id appears twice; names file and line.
    """
    problems: list[Problem] = []
    line_of: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                problem = _problem(json.loads(line), f"{path.stem}-{number}")
                if problem.id in line_of:
                    raise ValueError(f"id: {problem.id!r} is that of line {line_of[problem.id]}")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise ValueError(f"{path}, line {number}: {error}") from None
            line_of[problem.id] = number
            problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: expected problems, one a line, got an empty file")
    return problems


def _problem(row: Any, default_id: str) -> Problem:
    if not isinstance(row, Mapping):
        raise ValueError(f'expected an object {{"question": ..., "answer": ...}}, got {type(row).__name__}')
    question, solution = _text(row, "question"), _text(row, "answer")
    answer = after_hashes(solution) or boxed(solution)
    if answer is None:
        if "\n" in solution or "####" in solution:
            raise ValueError("answer: expected the result after #### or in \\boxed{}, found neither")
        answer, solution = solution, f"#### {solution}"
    return Problem(
        id=_text(row, "id") if row.get("id") is not None else default_id,
        prompt=PROMPT.format(question=question),
        answer=answer,
        group=_text(row, "group") if row.get("group") is not None else None,
        data={"solution": re.sub(r"\r\n?", "\n", solution)},
    )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: expected a text, got {value!r}")
    return unicode(value, key).strip()
