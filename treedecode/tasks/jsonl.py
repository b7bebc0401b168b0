"""Reads problems from JSONL files of GSM8K, MATH and others."""

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from treedecode.common.validation import positive_int
from treedecode.tasks.answers import after_hashes, boxed, equivalent, extract_answer, is_heading
from treedecode.tasks.base import Problem
from treedecode.tasks.fields import Fields

PROMPT = "Question: {question}\nAnswer:"
CHAT_PROMPT = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_QUESTION = "{question}"


class Jsonl:
    r"""The problems of JSONL files, one a line: `{"question": ..., "answer": ...}`, and maybe `"id"` and `"group"`.

    The answer is a worked solution that marks its result with `####` or `\boxed{}`, or, on one line and without a mark,
    the result itself. A problem without one is solved, but not graded.

    Args:
        path: the file of the split "test".
        train, validation: files of the other splits. Worked examples come from `train`.
        max_step_tokens, max_new_tokens: as in `Task`.
        prompt_template: what the model reads, with `{question}` where the question goes. The word before it begins the
            next question of a base model, and so ends a solution.
        question_field, answer_field, id_field: names of the fields; None = as known data sets have them (`Fields`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a problem (names file and line), or the template has no place for the question.
    """

    stop = "\n"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        train: str | os.PathLike[str] | None = None,
        validation: str | os.PathLike[str] | None = None,
        max_step_tokens: int = 128,
        max_new_tokens: int = 512,
        prompt_template: str = PROMPT,
        question_field: str | None = None,
        answer_field: str | None = None,
        id_field: str | None = None,
    ) -> None:
        if not isinstance(prompt_template, str) or _QUESTION not in prompt_template:
            raise ValueError(f"prompt_template: expected a text with {_QUESTION} in it, got {prompt_template!r}")
        self.name = os.fspath(path)
        self.end = _next_question(prompt_template)
        self.max_step_tokens = positive_int("max_step_tokens", max_step_tokens)
        self.max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
        fields = Fields(question_field, answer_field, id_field)
        files = {"test": path, "train": train, "validation": validation}
        self._files = {split: Path(file) for split, file in files.items() if file is not None}
        self._splits = {
            split: [replace(problem, task=self) for problem in read_problems(file, fields, prompt_template)]
            for split, file in self._files.items()
        }

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Draws problems of a file by `seed`, and returns them in the file's order; a larger number has the same ones.

        Raises:
            ValueError: the split has no file, or its file has fewer problems.
        """
        problems = self._split(split)
        if not 0 <= num_problems <= len(problems):
            raise ValueError(f"num_problems: {self._files[split]} has {len(problems)}, got {num_problems}")
        order = list(range(len(problems)))
        random.Random(seed).shuffle(order)
        return [problems[i] for i in sorted(order[:num_problems])]

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Returns the first `count` problems of the training file with their solutions.

        Raises:
            ValueError: there is no training file, it has fewer, or one has no answer.
        """
        problems = self._split("train")
        if count > len(problems):
            raise ValueError(f"count: {self._files['train']} has {len(problems)} problems, got {count}")
        for problem in problems[:count]:
            if problem.answer is None:
                raise ValueError(f"count: {self._files['train']}, problem {problem.id!r}, has no answer to show")
        return [(problem.prompt, " " + problem.data["solution"]) for problem in problems[:count]]

    def extract(self, text: str) -> str | None:
        """Returns the answer that `extract_answer` finds before the model begins another question."""
        for end in self.end:
            text = text.partition(end)[0]
        return extract_answer(text)

    def equivalent(self, first: str, second: str) -> bool:
        """Compares answers as `treedecode.verify.equivalent` does."""
        return equivalent(first, second)

    def is_final(self, text: str) -> bool:
        """Returns whether a line that marks the answer is complete, or the model has begun another question."""
        if any(end in text for end in self.end):
            return True
        complete_lines = text.rpartition("\n")[0]
        marked = after_hashes(complete_lines)
        return (marked is not None and not is_heading(marked)) or boxed(complete_lines) is not None

    def verify(self, problem: Problem, text: str) -> bool | None:
        """Returns whether the answer of a solution is that of the file; None where the file has none."""
        if problem.answer is None:
            return None
        answer = self.extract(text)
        return answer is not None and equivalent(answer, problem.answer)

    def _split(self, split: str) -> list[Problem]:
        if split not in ("train", "validation", "test"):
            raise ValueError(f"split: expected 'train', 'validation' or 'test', got {split!r}")
        if split not in self._splits:
            splits = " and ".join(map(repr, self._splits))
            raise ValueError(f"split: {self.name} is {splits} alone; Jsonl({self.name!r}, {split}=FILE) adds {split!r}")
        return self._splits[split]


def _next_question(prompt_template: str) -> tuple[str, ...]:
    """Returns the text by which a base model goes on with a problem of its own after the answer."""
    label = prompt_template.partition(_QUESTION)[0].strip().rpartition("\n")[2].strip()
    return (f"\n{label}",) if label else ()


def read_problems(path: Path, fields: Fields = Fields(), prompt_template: str = PROMPT) -> list[Problem]:  # noqa: B008
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
                row = fields.read(json.loads(line))
                problem = Problem(
                    id=row.id or f"{path.stem}-{number}",
                    prompt=prompt_template.replace(_QUESTION, row.question),
                    answer=row.answer,
                    group=row.group,
                    data={} if row.solution is None else {"solution": re.sub(r"\r\n?", "\n", row.solution)},
                )
                if problem.id in line_of:
                    raise ValueError(f"id: {problem.id!r} is that of line {line_of[problem.id]}")
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise ValueError(f"{path}, line {number}: {error}") from None
            line_of[problem.id] = number
            problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: expected problems, one a line, got an empty file")
    return problems
