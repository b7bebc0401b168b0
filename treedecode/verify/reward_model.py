"""RewardModel: a Transformers classification model that grades a solution, or each of its steps."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treedecode.common.validation import positive_int

if TYPE_CHECKING:
    from treedecode.decoding.frontier import Frontier
    from treedecode.tasks.base import Problem

_AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {
    "last": lambda steps: float(steps[-1]),
    "min": lambda steps: float(steps.min()),
    "prod": lambda steps: float(steps.prod()),
}
_Solution = tuple[tuple[int, ...], tuple[int, ...]]  # token ids, and the indices at which steps end
_HEADS = {"ForSequenceClassification": False, "ForTokenClassification": True}  # name of a head -> it grades steps


class RewardModel:
    """Scores branches by a reward model: one grade for the text, or one for each of its steps.

    A sequence classification head gives a text the probability of `positive_label`, or, with one label, its raw output.
    A token classification head is a process reward model in TRL's format: it reads the prompt, then the tokens of each
    step and those of the step token. The last of these carries the probability that the step is right (with one label,
    its sigmoid). A branch without a step yet is graded behind its prompt.

    Each different text of a call is computed once, in batches of similar length. A batch holds texts of one call alone,
    so that a score does not depend on other calls. The model runs in a thread of its own.

    Args:
        path_or_model: a folder or hub id, or a Transformers model in evaluation mode.
        tokenizer: the model's; None loads the one at the path.
        aggregate: makes the branch's score from those of its steps: "last", "min" or "prod".
        batch_size: texts per forward.
        step_separator: ends a step in a branch's text.
        step_token: the text that the model reads behind each step; None = `step_separator`.
        positive_label: index or name of the label that means good; None = the only one, or 1 of two.
        chat: puts prompt and text into the tokenizer's chat template.
        device: of a model given by its path.

    Raises:
        TypeError: there is no tokenizer, or the model has no classification head.
        ValueError: an argument is wrong or does not fit the model (named); or, when called, a text is too long for the
            model.
    """

    def __init__(
        self,
        path_or_model: Any,
        tokenizer: Any = None,
        *,
        aggregate: str = "last",
        batch_size: int = 8,
        step_separator: str = "\n",
        step_token: str | None = None,
        positive_label: int | str | None = None,
        chat: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if aggregate not in _AGGREGATES:
            raise ValueError(f"aggregate: expected one of {', '.join(_AGGREGATES)}, got {aggregate!r}")
        positive_int("batch_size", batch_size)
        if not step_separator or step_token == "":
            raise ValueError("step_separator, step_token: expected texts, got an empty one")
        model = path_or_model
        if isinstance(path_or_model, (str, os.PathLike)):
            model, loaded = _load(path_or_model, device)
            tokenizer = loaded if tokenizer is None else tokenizer
        if tokenizer is None:
            raise TypeError("tokenizer: expected the reward model's, got None")
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("chat: the tokenizer has no chat template")
        self.model = model
        self.tokenizer = tokenizer
        self.grades_steps = _grades_steps(type(model).__name__)
        if model.training:
            raise ValueError("path_or_model: the model is in training mode, which is random; call its eval()")
        if not self.grades_steps and aggregate != "last":
            raise ValueError(
                f"aggregate: {type(model).__name__} grades no steps, so expected 'last', got {aggregate!r}"
            )
        self.label = _label(model.config, positive_label)
        self.probability = self.grades_steps or self.label is not None
        self._aggregate = _AGGREGATES[aggregate]
        self._batch_size = batch_size
        self._separator = step_separator
        self._mark = self._encode(step_separator if step_token is None else step_token)
        if self.grades_steps and not self._mark:
            raise ValueError(f"step_token: {step_token!r} is no token of the tokenizer")
        self._pad = model.config.pad_token_id
        if self._pad is None and not self.grades_steps and batch_size > 1:
            # Transformers finds the last token of a padded text by it
            raise ValueError("batch_size: expected 1 for a model whose config has no pad_token_id")
        self._chat = chat
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="treedecode-reward")

    def __repr__(self) -> str:
        return f"RewardModel({self.model.name_or_path!r})"

    async def __call__(self, frontier: "Frontier", problem: "Problem") -> np.ndarray:
        """Scores the branches: `[n]` float64, in [0, 1] where `probability`."""

        async def grades(texts: list[str]) -> np.ndarray:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.grade, problem.prompt, texts)

        return await frontier.score(grades)

    def grade(self, prompt: str, texts: Sequence[str]) -> np.ndarray:
        """Scores solutions of one prompt in the calling thread: `[len(texts)]` float64."""
        built = [self._build(prompt, text) for text in texts]
        unique = sorted(dict.fromkeys(built), key=lambda solution: len(solution[0]))
        scores: dict[_Solution, float] = {}
        for i in range(0, len(unique), self._batch_size):
            batch = unique[i : i + self._batch_size]
            for solution, values in zip(batch, self._forward([ids for ids, _ in batch]), strict=True):
                scores[solution] = self._aggregate(values[list(solution[1])]) if self.grades_steps else float(values)
        return np.array([scores[solution] for solution in built], np.float64)

    def _build(self, prompt: str, text: str) -> _Solution:
        if not self.grades_steps:
            if self._chat:
                turns = [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": text.strip()}]
                ids = self._template(turns, add_generation_prompt=False)
            else:
                ids = list(self.tokenizer(prompt + text)["input_ids"])
            return self._checked(ids), ()
        if self._chat:
            ids = self._template([{"role": "user", "content": prompt.strip()}], add_generation_prompt=True)
        else:
            bos = getattr(self.tokenizer, "bos_token_id", None)
            ids = ([] if bos is None else [bos]) + self._encode(prompt)
        ends = []
        for step in [step for step in text.split(self._separator) if step.strip()] or [""]:
            ids += self._encode(step) + self._mark
            ends.append(len(ids) - 1)
        return self._checked(ids), tuple(ends)

    def _template(self, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        options = {"tokenize": True, "return_dict": False, "add_generation_prompt": add_generation_prompt}
        return list(self.tokenizer.apply_chat_template(turns, **options))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked(self, ids: list[int]) -> tuple[int, ...]:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            raise ValueError(f"a text of {len(ids)} tokens is longer than the reward model's {limit}")
        return tuple(ids)

    @torch.no_grad()
    def _forward(self, batch: list[tuple[int, ...]]) -> np.ndarray:
        """Scores texts sorted by length: `[batch]` float64, or `[batch, tokens]` where steps are graded."""
        width = len(batch[-1])
        ids = torch.full((len(batch), width), 0 if self._pad is None else self._pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.double()
        if self.label is not None:
            scores = logits.softmax(-1)[..., self.label]
        else:
            scores = logits[..., 0].sigmoid() if self.grades_steps else logits[..., 0]
        return scores.cpu().numpy()


def _load(path: str | os.PathLike[str], device: torch.device | str) -> tuple[Any, Any]:
    from transformers import (  # takes seconds to import
        AutoConfig,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    architectures = AutoConfig.from_pretrained(path).architectures or [""]
    loader = AutoModelForTokenClassification if _grades_steps(architectures[0]) else AutoModelForSequenceClassification
    model = loader.from_pretrained(path, dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(path)


def _grades_steps(architecture: str) -> bool:
    for head, steps in _HEADS.items():
        if architecture.endswith(head):
            return steps
    raise TypeError(f"path_or_model: expected a model with a head {' or '.join(_HEADS)}, got {architecture or 'none'}")


def _label(config: Any, positive: int | str | None) -> int | None:
    """Returns the index of the good label; None where the only output is no label."""
    count = config.num_labels
    if positive is None:
        if count > 2:
            raise ValueError(f"positive_label: expected one of the model's {count} labels, got None")
        return 1 if count == 2 else None
    label = config.label2id.get(positive) if isinstance(positive, str) else positive
    if type(label) is not int or not 0 <= label < count or count == 1:
        labels = ", ".join(config.label2id) if count > 1 else "none, as the model has a single output"
        raise ValueError(f"positive_label: expected one of {labels}; got {positive!r}")
    return label
