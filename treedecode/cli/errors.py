"""How a command says that an argument is wrong: a line that names it, and an exit status."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISUSED = 2
_PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130  # as a shell reports the end by SIGINT


@contextmanager
def argument(name: str, *inner: str) -> Iterator[None]:
    """Errors of what is done inside are errors of a command's argument, and say so.

    Args:
        name: of the argument.
        inner: names by which what is called inside knows it.

    Raises:
        ValueError: in place of OSError, TypeError, ValueError.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        text = first_line(error)
        for known in (name, *inner):
            text = text.removeprefix(f"{known}: ")
        raise ValueError(f"{name}: {text}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run(command: str, work: Callable[[], int], interrupted: Callable[[], str]) -> int:
    """Runs a command's work.

    Args:
        interrupted: what to say after Ctrl-C.

    Returns:
        the exit status: that of `work`; 2, with a line on standard error, where an argument is wrong; 130 after Ctrl-C.

    Raises:
        Exception: of a problem's search, which has a note that says which problem it was: no argument's error.
    """

    show = warnings.showwarning

    def say(message: Warning | str, category: type[Warning], filename: str, *more: Any, **others: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            print(f"treedecode {command}: warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *more, **others)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = say
            return work()
    except KeyboardInterrupt:
        print(f"treedecode {command}: interrupted; {interrupted()}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        if getattr(error, "__notes__", None):
            raise
        print(f"treedecode {command}: error: {first_line(error)}", file=sys.stderr)
        return MISUSED


def whole_number(text: str) -> int:
    """The value of an option that counts something, or is a seed.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or a negative one.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def at_least_one(text: str) -> int:
    """The value of an option that counts what there has to be.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or 0.
    """
    if whole_number(text) == 0:
        raise argparse.ArgumentTypeError("expected at least 1, got 0")
    return int(text)


def check_folder(folder: Path) -> None:
    """Checks what is there of a folder to write to, which is made with its first file.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    near = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise ValueError(f"out: expected a folder to write to, and {near} is none")
