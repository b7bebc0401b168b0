"""Reports a wrong argument of a command: a line that names it, and an exit status."""

import argparse
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FAILED = 1
USAGE_ERROR = 2  # as argparse exits
INTERRUPTED, TERMINATED = 130, 143  # as a shell reports the end by SIGINT, and by SIGTERM
_MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)  # no argument is wrong then
_PACKAGE = Path(__file__).parents[1]


@contextmanager
def errors_of_argument(name: str, *inner: str) -> Iterator[None]:
    """Turns the errors of a block into errors that name an argument of the command.

    Args:
        name: of the argument.
        inner: names that the argument has in the functions that the block calls.

    Raises:
        ValueError: in place of OSError, TypeError, ValueError.
    """
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        text = first_line(error)
        for prefix in (name, *inner):
            text = text.removeprefix(f"{prefix}: ")
        raise ValueError(f"{name}: {text}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run_command(command: str, work: Callable[[], int], interrupted: Callable[[], str]) -> int:
    """Runs a command, and reports its errors and warnings in a line each.

    Args:
        interrupted: gives the message after Ctrl-C.

    Returns:
        the exit status: that of `work`; with a line on standard error 2 where an argument is wrong, 1 where a disk is
        full or fails, 130 after Ctrl-C and 143 after SIGTERM.

    Raises:
        Exception: of a problem's search, which has a note that names the problem; no argument is wrong then.
    """
    show_in_full = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            print(f"treedecode {command}: warning: {message}", file=sys.stderr)
        else:
            show_in_full(message, category, filename, *args, **kwargs)

    try:
        with warnings.catch_warnings(), _terminate_as_interrupted() as terminated:
            warnings.showwarning = show
            return work()
    except KeyboardInterrupt:
        print(f"treedecode {command}: interrupted; {interrupted()}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    except BrokenPipeError:
        raise
    except (ImportError, MemoryError, OSError, TypeError, ValueError) as error:
        if getattr(error, "__notes__", None):
            raise
        print(f"treedecode {command}: error: {first_line(error)}", file=sys.stderr)
        return FAILED if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS else USAGE_ERROR


@contextmanager
def _terminate_as_interrupted() -> Iterator[list[int]]:
    """Lets SIGTERM end a block as Ctrl-C does; the list that it gives is not empty then."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def whole_number(text: str) -> int:
    """Reads the value of an option that counts something, or is a seed.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or a negative one.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def at_least_one(text: str) -> int:
    """Reads the value of an option that counts something of which there has to be at least one.

    Raises:
        argparse.ArgumentTypeError: not a whole number, or 0.
    """
    if whole_number(text) == 0:
        raise argparse.ArgumentTypeError("expected at least 1, got 0")
    return int(text)


def folder(text: str) -> Path:
    """Reads the value of an option that names a folder.

    Raises:
        argparse.ArgumentTypeError: the text is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def check_folder(folder: Path) -> None:
    """Checks that a folder can be written to, or made; it is made with its first file.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: expected a folder to write to, and {existing} is none")
