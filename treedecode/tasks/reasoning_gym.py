"""ReasoningGym: any dataset of reasoning-gym (2505.24760; extra `tasks`), by name."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from treedecode.common.validation import positive_int
from treedecode.tasks.answers import normalize
from treedecode.tasks.base import Problem

PROMPT = "{question}\n\nThink step by step, and give the final answer between <answer> and </answer>.\n"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SPLITS = ("train", "validation", "test")
# A dataset seeds its i-th problem with seed + i, and some hand that to NumPy, which takes 32 bits. Every seed of every
# split gets a range of its own, so that no two generate the same problem.
_MAX_PROBLEMS = 1 << 16
_MAX_SEEDS = 1 << 14


class ReasoningGym:
    """Problems that a generator of reasoning-gym makes, scored by its own `score_answer`.

    Splits are generated from disjoint ranges of seeds. A dataset with few different problems may repeat some by chance.

    Args:
        dataset: the name of a dataset, as "leg_counting".
        max_step_tokens, max_new_tokens: as in `Task`.
        config: settings of the dataset, as its own configuration names them.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: there is no such dataset, or it refuses the settings.
    """

    stop = "\n"
    end: tuple[str, ...] = ()

    def __init__(self, dataset: str, *, max_step_tokens: int = 128, max_new_tokens: int = 512, **config: Any) -> None:
        datasets = dataset_names()
        if dataset not in datasets:
            raise ValueError(f"dataset: expected one of reasoning-gym's {', '.join(datasets)}; got {dataset!r}")
        self.max_step_tokens = positive_int("max_step_tokens", max_step_tokens)
        self.max_new_tokens = positive_int("max_new_tokens", max_new_tokens)
        if reserved := {"seed", "size"} & config.keys():
            raise ValueError(
                f"config: {' and '.join(sorted(reserved))} follow from the split and the number of problems"
            )
        self.name = f"reasoning_gym:{dataset}"
        self._dataset = dataset
        self._config = config

    def problems(self, num_problems: int, *, split: str = "test", seed: int = 0) -> list[Problem]:
        """Generates problems of a split.

        Raises:
            ValueError: no such split; `seed` is not within 0 .. 16383, or `num_problems` not within 0 .. 65536.
        """
        if split not in _SPLITS:
            raise ValueError(f"split: expected one of {', '.join(_SPLITS)}, got {split!r}")
        if not 0 <= num_problems <= _MAX_PROBLEMS:
            raise ValueError(f"num_problems: expected 0 to {_MAX_PROBLEMS}, got {num_problems}")
        if not 0 <= seed < _MAX_SEEDS:
            raise ValueError(f"seed: expected 0 to {_MAX_SEEDS - 1}, got {seed}")
        if num_problems == 0:
            return []
        first = (_SPLITS.index(split) * _MAX_SEEDS + seed) * _MAX_PROBLEMS
        entries = self._create(first, num_problems)
        return [self._problem(f"{split}-{seed}-{i}", entries[i]) for i in range(num_problems)]

    def _create(self, seed: int, size: int) -> Any:
        from reasoning_gym import create_dataset

        try:
            return create_dataset(self._dataset, seed=seed, size=size, **self._config)
        except (TypeError, AssertionError) as error:  # a wrong name, a wrong value
            raise ValueError(f"config: {self._dataset} refuses {self._config}: {error}") from error

    @cached_property
    def _scorer(self) -> Any:
        return self._create(0, 1)

    def _problem(self, id: str, entry: dict[str, Any]) -> Problem:
        return Problem(
            id=f"{self._dataset}-{id}",
            prompt=PROMPT.format(question=entry["question"].strip()),
            answer=None if entry["answer"] is None else str(entry["answer"]),
            data=entry,
            task=self,
        )

    def examples(self, count: int) -> Sequence[tuple[str, str]]:
        """Returns problems of the training split's last seed with their answers; the datasets have no reasoning.

        Raises:
            ValueError: the dataset can only check answers.
        """
        problems = self.problems(count, split="train", seed=_MAX_SEEDS - 1)
        if any(problem.answer is None for problem in problems):
            raise ValueError(f"count: {self.name} has no answers to show, so expected 0, got {count}")
        return [(problem.prompt, f"<answer>{problem.answer}</answer>\n") for problem in problems]

    def extract(self, text: str) -> str | None:
        """Returns the content of the last complete `<answer>` of a solution; None where there is none."""
        answers = [answer.strip() for answer in _ANSWER.findall(text)]
        return answers[-1] if answers and answers[-1] else None

    def equivalent(self, first: str, second: str) -> bool:
        """Returns whether answers are the same number or the same text, whatever its white space.

        They are not compared as mathematics: answers are also moves, grids and words.
        """
        return normalize(" ".join(first.split())) == normalize(" ".join(second.split()))

    def is_final(self, text: str) -> bool:
        """Returns whether an answer is complete."""
        return self.extract(text) is not None

    def score(self, problem: Problem, text: str) -> float:
        """Returns the dataset's score of a solution, which may give credit for a part; 0 without an answer."""
        answer = self.extract(text)
        return 0.0 if answer is None else float(self._scorer.score_answer(answer, dict(problem.data)))

    def verify(self, problem: Problem, text: str) -> bool:
        """Returns whether the dataset gives a solution its full score."""
        return self.score(problem, text) >= 1


def dataset_names() -> list[str]:
    """Returns the names of all datasets, sorted.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ModuleNotFoundError(
            "reasoning_gym is not installed; pip install 'treedecode[tasks]'", name="reasoning_gym"
        ) from error
    return sorted(factory.DATASETS)
