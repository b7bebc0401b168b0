"""Builds prompts: worked examples before every problem, and the chat template."""

import os
from collections.abc import Sequence
from typing import Any

from treedecode.common.special_tokens import encode_as_text, spelled_out
from treedecode.common.validation import int_in
from treedecode.tasks.base import Problem, Task
from treedecode.tasks.jsonl import Jsonl

Examples = Sequence[tuple[str, str]]


def few_shot(source: Task | str | os.PathLike[str], shots: int, **options: Any) -> list[tuple[str, str]]:
    """Returns `shots` worked examples (prompt, solution) of a task, or the first rows of a JSONL file.

    Args:
        options: of the file, as of `treedecode.tasks.load`.

    Raises:
        TypeError: `shots` is no int.
        ValueError: `shots` is negative, or the source has fewer examples (named).
    """
    if int_in("shots", shots, 0) == 0:
        return []
    if isinstance(source, (str, os.PathLike)):
        source = Jsonl(source, train=source, **options)
    return list(source.examples(shots))


def prefix(examples: Examples) -> str:
    """Joins worked examples into the text before every problem, whose pages are computed, held and read once."""
    return "".join(f"{prompt}{solution.rstrip()}\n\n" for prompt, solution in examples)


def require_unseen(problems: Sequence[Problem], examples: Examples) -> None:
    """Checks that no problem is among the worked examples, whose solutions would give its answer away.

    Prompts are compared without regard to white space and letter case.

    Raises:
        ValueError: some are; names the first.
    """
    shown = {_comparable(prompt) for prompt, _ in examples}
    seen = [problem.id for problem in problems if _comparable(problem.prompt) in shown]
    if seen:
        raise ValueError(
            f"examples: {len(seen)} of the problems are among them, whose answers they give away: the first is "
            f"{seen[0]!r}"
        )


def _comparable(text: str) -> str:
    return " ".join(text.split()).casefold()


def format_prompts(
    problems: Sequence[Problem],
    examples: Examples = (),
    *,
    tokenizer: Any = None,
    chat: bool = False,
    system_prompt: str | None = None,
    special_tokens: bool = False,
) -> list[str] | list[list[int]]:
    """Builds the prompt of every problem.

    Args:
        chat: uses the tokenizer's chat template, with the examples as earlier turns of the conversation.
        system_prompt: with `chat`, the first message of the conversation.
        special_tokens: with `chat`, tokens such as `<|im_end|>` count as such where a problem, an example or the system
            prompt spells them out; otherwise they are text.

    Returns:
        `[len(problems)]` texts; with `chat` token ids, since a template spells special tokens out and another tokenizer
        call could add them again.

    Raises:
        ValueError: `chat` with a tokenizer that has no template, or a system prompt without `chat`, or with a template
            that takes none.
    """
    if not chat:
        if system_prompt is not None:
            raise ValueError("system_prompt: expected chat, whose first message it is")
        before = prefix(examples)
        return [before + problem.prompt for problem in problems]
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one")
    turns = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    turns += [
        {"role": role, "content": text.strip()}
        for example in examples
        for role, text in zip(("user", "assistant"), example, strict=True)
    ]
    conversations = [[*turns, {"role": "user", "content": problem.prompt.strip()}] for problem in problems]
    return [chat_ids(tokenizer, messages, special_tokens=special_tokens) for messages in conversations]


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]], *, special_tokens: bool = False) -> list[int]:
    """Applies a chat template, up to where the model's answer begins.

    Args:
        special_tokens: whether special tokens that the messages spell out count as such.

    Raises:
        ValueError: the template refuses the messages, or leaves one out.
    """

    def apply(messages: Sequence[dict[str, str]], tokenize: bool) -> Any:
        options = {"add_generation_prompt": True, **({"return_dict": False} if tokenize else {})}
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, **options)
        except Exception as error:  # jinja2.TemplateError, with which templates refuse roles and orders
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise ValueError(f"chat: the tokenizer's template refuses the messages: {error}") from error

    if special_tokens or not spelled_out(tokenizer, "\n".join(turn["content"] for turn in messages)):
        ids = list(apply(messages, tokenize=True))
        if any(turn["role"] == "system" for turn in messages):
            _check_system_prompt(messages, apply)
        return ids
    # The template is applied to names in place of the messages. What stands between these is tokenized with its special
    # tokens, and the messages without.
    names = [f"message\u2063{i}\u2063" for i in range(len(messages))]
    rest = apply([{**turn, "content": name} for turn, name in zip(messages, names, strict=True)], tokenize=False)
    ids = []
    for turn, name in zip(messages, names, strict=True):
        before, found, rest = rest.partition(name)
        if not found:
            raise ValueError(f"chat: the tokenizer's template leaves out the {turn['role']} message")
        ids += tokenizer.encode(before, add_special_tokens=False)
        ids += encode_as_text(tokenizer, turn["content"])
    return [*ids, *tokenizer.encode(rest, add_special_tokens=False)]


def _check_system_prompt(messages: Sequence[dict[str, str]], apply: Any) -> None:
    system = next(turn["content"] for turn in messages if turn["role"] == "system")
    if system.strip() and system.strip() not in apply(messages, tokenize=False):
        raise ValueError("system_prompt: the tokenizer's chat template leaves it out")
