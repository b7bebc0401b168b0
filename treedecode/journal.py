"""Journal: the solutions of a run as they come, so that a run that was killed goes on where it was."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "treedecode.journal/1"
_SYNC_SECONDS = 1.0


class Journal:
    """A file of JSON lines: what the run is, then one solution after another.

    A process that is killed loses none of them, a machine that loses its power those of the last second: a line is the
    system's at once, and waiting for the disk after each would cost as much as many a small model's forward.

    Attributes:
        solutions: by problem id, those that an earlier process wrote.
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
            found = [json.loads(line) for line in lines]
            schema = found[0]["schema"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"journal: {self._path} is not a journal of treedecode") from None
        if schema != SCHEMA:
            raise ValueError(f"journal: {self._path} has the schema {schema!r}, not {SCHEMA!r}")
        mine, other = header["run"], found[0]["run"]
        differ = sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key))
        if differ:
            was = ", ".join(f"{key} was {other.get(key)!r} and is {mine.get(key)!r}" for key in differ)
            raise ValueError(f"journal: {self._path} is of another run: {was}")
        self.solutions = {line["id"]: line for line in found[1:]}

    def add(self, solution: Mapping[str, Any]) -> None:
        """Writes a solution, `{"id", ...}`."""
        self._write(solution)

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
