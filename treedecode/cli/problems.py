"""Reads the problems of `treedecode solve`, and builds their prompts."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treedecode.cli.errors import at_least_one, errors_of_argument, whole_number
from treedecode.cli.models import num_lines, task_for

if TYPE_CHECKING:
    from treedecode.decoding.decoder import Decoder, Prompt
    from treedecode.tasks import Problem, Task

_NUM_SHOTS = 8
_NUM_PROBLEMS = 20
_FIELDS = ("question_field", "answer_field", "id_field")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which problems are solved, and what the model reads."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--task", help="countdown (the default), or reasoning_gym:NAME")
    source.add_argument("--data", metavar="FILE.jsonl", help='problems, {"question": ..., "answer": ...} a line')
    add("--num-problems", type=at_least_one, metavar="N", help=f"default: {_NUM_PROBLEMS}, or all of --data")
    add("--split", choices=("train", "validation", "test"), help="of --task; default: test")
    known = "default: as GSM8K, MATH, SVAMP, MGSM or GSM-Symbolic have it"
    add("--question-field", metavar="NAME", help=f"of --data; {known}")
    add("--answer-field", metavar="NAME", help="the same for the answer; problems without one are not graded")
    add("--id-field", metavar="NAME", help="the same for the id")
    add("--few-shot", metavar="FILE.jsonl", help="worked examples before every problem; default: the task's own")
    add(
        "--shots",
        type=whole_number,
        metavar="N",
        help=f"how many; default: {_NUM_SHOTS} with --few-shot, otherwise none",
    )
    add(
        "--prompt-template",
        metavar="TEXT or @FILE",
        help=r"of --data: what the model reads, with {question} in it, and \n for a line break",
    )
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--system-prompt", metavar="TEXT", help="with --chat: the first message")
    add(
        "--special-tokens",
        action="store_true",
        help="take special tokens that problems spell out for such tokens; by default they are text",
    )


def task_of(arguments: argparse.Namespace) -> "Task":
    """Loads the task or the file of problems.

    Raises:
        ValueError: an option is wrong.
    """
    limit = arguments.max_new_tokens
    if arguments.data is None:
        unused = [name for name in (*_FIELDS, "prompt_template") if getattr(arguments, name) is not None]
        if unused:
            raise ValueError(f"{unused[0].replace('_', '-')}: expected it with --data alone; a task has its own")
        return task_for(arguments.task or "countdown", max_new_tokens=limit)
    if arguments.split not in (None, "test"):
        raise ValueError("split: expected it with --task alone; a file has no splits")
    return task_for(arguments.data, "data", limit, **_file_options(arguments))


def _file_options(arguments: argparse.Namespace) -> dict[str, Any]:
    from treedecode.tasks.jsonl import CHAT_PROMPT

    options = {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
    if arguments.prompt_template is not None:
        options["prompt_template"] = _template(arguments.prompt_template)
    elif arguments.chat:
        options["prompt_template"] = CHAT_PROMPT
    return options


def _template(text: str) -> str:
    if text.startswith("@"):
        with errors_of_argument("prompt-template"):
            text = Path(text[1:]).read_text(encoding="utf-8")
    else:
        text = text.replace("\\n", "\n")
    if "{question}" not in text:
        raise ValueError(f"prompt-template: expected a text with {{question}} in it, got {text!r}")
    return text


def problems_of(arguments: argparse.Namespace, task: "Task") -> "list[Problem]":
    """Returns the problems to solve."""
    count = arguments.num_problems
    if count is None and arguments.data is not None:
        count = num_lines(arguments.data)
    count = _NUM_PROBLEMS if count is None else count
    return task.problems(count, split=arguments.split or "test", seed=arguments.seed)


def examples_of(arguments: argparse.Namespace, task: "Task", problems: "list[Problem]") -> list[tuple[str, str]]:
    """Returns the worked examples.

    Raises:
        ValueError: there are fewer, or some are among the problems.
    """
    from treedecode.tasks import few_shot
    from treedecode.tasks.prompts import require_unseen

    source = arguments.few_shot
    if source is not None and not os.path.isfile(source):
        raise ValueError(f"few-shot: expected a file of examples, and there is no {source!r}")
    if source is not None and arguments.data is not None and os.path.samefile(source, arguments.data):
        raise ValueError("few-shot: is the file of the problems itself, whose answers the examples would give away")
    shots = arguments.shots if arguments.shots is not None else _NUM_SHOTS if source is not None else 0
    options = _file_options(arguments) if source is not None else {}
    with errors_of_argument("shots" if source is None else "few-shot", "count", "examples"):
        examples = few_shot(task if source is None else source, shots, **options)
        require_unseen(problems, examples)
    return examples


def prompts_of(
    arguments: argparse.Namespace, decoder: "Decoder", problems: "list[Problem]", examples: list[tuple[str, str]]
) -> "dict[str, Prompt]":
    """Returns what the model reads of each problem, by id.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not fit.
    """
    from treedecode.tasks import format_prompts

    with errors_of_argument("system-prompt" if arguments.system_prompt is not None else "chat", "system_prompt"):
        prompts = format_prompts(
            problems,
            examples,
            tokenizer=decoder.tokenizer,
            chat=arguments.chat,
            system_prompt=arguments.system_prompt,
            special_tokens=arguments.special_tokens,
        )
    encoded: list[Prompt] = [
        decoder.encode(prompt, special_tokens=arguments.special_tokens) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    return dict(zip([problem.id for problem in problems], encoded, strict=True))
