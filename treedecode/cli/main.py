"""The `treedecode` command, `td` for short."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from treedecode import __version__
from treedecode.cli import gate, info, solve, study
from treedecode.cli.errors import USAGE_ERROR


def _info(_: argparse.Namespace) -> int:
    info.main()
    return 0


def _tune(_: argparse.Namespace) -> int:
    from treedecode.ops import tuning  # imports torch

    try:
        print(tuning.tune())
    except RuntimeError as error:
        print(f"treedecode tune: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as the commands do, without the usage of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message.removeprefix('argument --')}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="treedecode", description="Shared-prefix decoding of search trees.")
    parser.add_argument("--version", action="version", version=f"treedecode {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    info_parser = commands.add_parser("info", help="versions, instruction set, and which backend each op uses and why")
    info_parser.set_defaults(run=_info)
    tune_parser = commands.add_parser(
        "tune", help="measure which backend of each op is faster on this GPU, and keep that"
    )
    tune_parser.set_defaults(run=_tune)
    solve.add_parser(commands)
    gate.add_parser(commands)
    study.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        argv: the arguments after the program's name; None = those of the process.

    Raises:
        Exception: of a problem's search.
    """
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)  # for records of what was run
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except BrokenPipeError as error:
        if getattr(error, "__notes__", None):  # of a problem's search: a pipe of its verifier
            raise
        # the reader of the output has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (takes the output that Python flushes at its end)
        status = 128 + signal.SIGPIPE
    return status
