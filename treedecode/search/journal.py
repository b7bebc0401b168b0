"""Journal: the solutions of a run as they come, so that a run that was killed goes on where it was."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "treedecode.journal/3"
_SYNC_SECONDS = 1.0
_SOLUTION = b'{"id": '  # how its line begins
_SHOWN = 8  # entries of lists that a message shows


class Journal:
    """A file of JSON lines: what the run is, then one solution after another, and now and then what the run has spent.

    Each line after the first says under "spent" what all processes of the run have spent by then; a solution's line has
    the solution besides, and begins with its "id".

    A process that is killed loses none of them, a machine that loses its power those of the last second: a line is the
    system's at once, and waiting for the disk after each would cost as much as many a small model's forward.

    Attributes:
        solutions: by problem id, those that an earlier process wrote.
        spent: by earlier processes, as of their last line; None = there is none.
    """

    def __init__(self, path: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        """Opens a journal, a new one or that of an earlier process with the same run.

        Args:
            run: all that the solutions depend on, as JSON.

        Raises:
            ValueError: the file is another run's, or no journal.
        """
        self._path, self._next_sync = Path(path), 0.0
        header = {"schema": SCHEMA, "run": json.loads(json.dumps(run))}
        self.solutions: dict[str, dict[str, Any]] = {}
        self.spent: dict[str, Any] | None = None
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        whole, rest = lines[:-1], lines[-1]
        if whole:
            self._read(whole, header)
        elif rest and not (json.dumps(header) + "\n").encode().startswith(rest):
            raise ValueError(f"journal: {self._path} is not a journal of treedecode")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)
        if rest or not whole:  # the last line was cut off by the end of its process
            self._file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            self._write(header)

    def _read(self, lines: list[bytes], header: dict[str, Any]) -> None:
        try:
            first = json.loads(lines[0])
            schema = first["schema"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"journal: {self._path} is not a journal of treedecode") from None
        if schema != SCHEMA:
            was = f"has the schema {schema!r}, not {SCHEMA!r}: another version of treedecode wrote it"
            raise ValueError(f"journal: {self._path} {was}")
        mine, other = header["run"], first["run"]
        differ = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
        if differ:
            was = ", ".join(f"{key} {_change(other.get(key), mine.get(key))}" for key in differ)
            raise ValueError(f"journal: {self._path} is of another run: {was}")
        for number, text in enumerate(lines[1:], 2):
            try:
                line = json.loads(text)
                self.spent = line["spent"]
                if "id" in line:
                    self.solutions[line["id"]] = line
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"journal: {self._path}, line {number}, cannot be read") from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Errors in what is made of the lines inside are the journal's: ValueError."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"journal: {self._path} has a line that cannot be read: {error!r}") from None

    def add(self, solution: Mapping[str, Any], spent: Mapping[str, Any]) -> None:
        """Writes a solution, `{"id", ...}`, and what the run has spent when it comes."""
        self._write({"id": solution["id"], **solution, "spent": spent})

    def add_spent(self, spent: Mapping[str, Any]) -> None:
        """Writes what the run has spent while no solution came."""
        self._write({"spent": spent})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        if time.monotonic() >= self._next_sync:
            os.fsync(self._file.fileno())
            self._next_sync = time.monotonic() + _SYNC_SECONDS

    def close(self) -> None:
        """Closes the file, all of which is on the disk then."""
        os.fsync(self._file.fileno())
        self._file.close()


def num_solutions(path: str | os.PathLike[str]) -> int:
    """How many solutions a journal holds, whichever run it is of; 0 where there is no file."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        return sum(line.startswith(_SOLUTION) and line.endswith(b"\n") for line in file)


def _change(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list) and len(old) + len(new) > _SHOWN:
        return f"had {len(old)} entries and has {len(new)}" if len(old) != len(new) else "has other entries"
    return f"was {old!r} and is {new!r}"
