"""Builds prompts: worked examples before every problem, and the chat template."""

import os
from collections.abc import Sequence
from typing import Any

from treedecode.common.validation import int_in
from treedecode.tasks.base import Problem, Task
from treedecode.tasks.jsonl import Jsonl

Examples = Sequence[tuple[str, str]]


def few_shot(source: Task | str | os.PathLike[str], shots: int) -> list[tuple[str, str]]:
    """Returns `shots` worked examples (prompt, solution) of a task, or the first rows of a JSONL file.

    Raises:
        TypeError: `shots` is no int.
        ValueError: `shots` is negative, or the source has fewer examples (named).
    """
    if int_in("shots", shots, 0) == 0:
        return []
    if isinstance(source, (str, os.PathLike)):
        source = Jsonl(source, train=source)
    return list(source.examples(shots))


def prefix(examples: Examples) -> str:
    """Joins worked examples into the text before every problem, whose pages are computed, held and read once."""
    return "".join(f"{prompt}{solution.rstrip()}\n\n" for prompt, solution in examples)


def format_prompts(
    problems: Sequence[Problem], examples: Examples = (), *, tokenizer: Any = None, chat: bool = False
) -> list[str] | list[list[int]]:
    """Builds the prompt of every problem.

    Args:
        chat: uses the tokenizer's chat template, with the examples as earlier turns of the conversation.

    Returns:
        `[len(problems)]` texts; with `chat` token ids, since a template spells special tokens out and another tokenizer
        call could add them again.

    Raises:
        ValueError: `chat` with a tokenizer that has no template.
    """
    if not chat:
        before = prefix(examples)
        return [before + problem.prompt for problem in problems]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one")
    turns = [
        {"role": role, "content": text.strip()}
        for example in examples
        for role, text in zip(("user", "assistant"), example, strict=True)
    ]
    return [
        tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": problem.prompt.strip()}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        for problem in problems
    ]
