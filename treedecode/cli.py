"""The `treedecode` command (short: `td`)."""

import argparse
from collections.abc import Sequence

from treedecode import __version__, collect_env


def _info(_: argparse.Namespace) -> int:
    collect_env.main()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="treedecode", description="Shared-prefix decoding of search trees.")
    parser.add_argument("--version", action="version", version=f"treedecode {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, instruction set, and which backend each op uses and why")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        argv: the arguments after the program's name; default: the process's own.
    """
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
