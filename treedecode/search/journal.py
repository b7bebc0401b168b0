"""Journal: a file of the solutions of a run, from which a later process goes on."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = "treedecode.journal/5"
_SYNC_SECONDS = 1.0
_SOLUTION = b'{"id": '  # how its line begins
_SAMPLES = b', "num_samples": '  # and goes on
# What the parts of a run's description are, in a message.
_WORDS = {
    "budget": "the budget",
    "max_tokens": "the number of tokens that the model's context and kv_memory have room for",
    "model": "the model",
    "problems": "the problems",
    "sampling": "the sampling",
    "seed": "the seed",
    "strategy": "the strategy",
    "task": "the task",
    "verifier": "the verifier",
    "weights": "the model's weights",
}
_DIGESTS = ("problems", "weights")  # whose values say nothing to a reader
_ADVICE = "Give the arguments of that run to go on with it, or another file to begin anew"


class Journal:
    """Writes a file of JSON lines: a description of the run, then its solutions, and now and then its spending.

    Each line after the first has under "spent" what all processes of the run have spent by then. A solution's line
    begins with its "id" and "num_samples", and of lines with the same id the last one counts.

    A process that is killed loses no line, and a machine that loses its power loses those of the last second: the
    operating system has a line at once, but the file is synchronised once a second, since waiting for the disk after
    each line would cost as much time as a forward of a small model.

    Attributes:
        solutions: those that earlier processes wrote, by problem id.
        smaller: the ids of solutions with fewer samples, which this run adds to.
        spent: the spending of earlier processes, as of their last line; None = there is none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run: Mapping[str, Any],
        problems: Mapping[str, str],
        num_samples: int | None = None,
    ) -> None:
        """Opens a new journal, or that of an earlier process with the same run, which had these problems or fewer.

        Args:
            run: everything that all solutions depend on, as JSON.
            problems: by id, a digest of what else the solution of each depends on.
            num_samples: of each solution, where one of fewer samples can be added to; None = it cannot.

        Raises:
            ValueError: the file is another run's, has solutions of other problems, or is no journal.
        """
        self._problems, self._num_samples = problems, num_samples
        self._path, self._next_sync = Path(path), 0.0
        header = {"schema": SCHEMA, "run": json.loads(json.dumps(run))}
        self.solutions: dict[str, dict[str, Any]] = {}
        self.smaller: list[str] = []
        self.spent: dict[str, Any] | None = None
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        complete, torn = lines[:-1], lines[-1]  # a line is torn when its process ends while it writes it
        if complete:
            self._read(complete, header)
        elif torn and not (json.dumps(header) + "\n").encode().startswith(torn):
            raise ValueError(f"journal: {self._path} is not a journal of treedecode")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)
        if torn or not complete:
            self._file.truncate(sum(len(line) + 1 for line in complete))
        if not complete:
            self._write(header)

    def _read(self, lines: list[bytes], header: dict[str, Any]) -> None:
        try:
            first = json.loads(lines[0])
            schema = first["schema"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"journal: {self._path} is not a journal of treedecode") from None
        if schema != SCHEMA:
            reason = f"has the schema {schema!r}, not {SCHEMA!r}: another version of treedecode wrote it"
            raise ValueError(f"journal: {self._path} {reason}")
        old, new = first["run"], header["run"]
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            changes = "; ".join(_change(key, old.get(key), new.get(key)) for key in changed)
            raise ValueError(f"journal: {self._path} is of another run: {changes}. {_ADVICE}")
        for number, text in enumerate(lines[1:], 2):
            try:
                line = json.loads(text)
                self.spent = line["spent"]
                if "id" in line:
                    self.solutions[line["id"]] = line
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"journal: {self._path}, line {number}, cannot be read") from None
        self._check_problems()
        self._check_samples()

    def _check_problems(self) -> None:
        dropped = [problem_id for problem_id in self.solutions if problem_id not in self._problems]
        if dropped:
            raise ValueError(
                f"journal: {self._path} has solutions of {len(dropped)} problems that are not among these, the first "
                f"is {dropped[0]!r}. A run can have more problems than before, but not others or fewer. {_ADVICE}"
            )
        changed = [key for key, line in self.solutions.items() if line.get("problem") != self._problems[key]]
        if changed:
            raise ValueError(
                f"journal: {self._path} has solutions of {len(changed)} problems with another question, answer, "
                f"template or worked examples, the first is {changed[0]!r}. {_ADVICE}"
            )

    def _check_samples(self) -> None:
        if self._num_samples is None:
            return
        with self.reading():
            numbers = {key: int(line["num_samples"]) for key, line in self.solutions.items()}
        most = max(numbers.values(), default=0)
        if most > self._num_samples:
            raise ValueError(
                f"journal: {self._path} has solutions of {most} samples, and num_samples is {self._num_samples}. A run "
                f"can have more samples than before, but not fewer. {_ADVICE}"
            )
        self.smaller = [key for key, number in numbers.items() if number < self._num_samples]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns errors of a block that reads the journal's lines into a ValueError that names the journal."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"journal: {self._path} has a line that cannot be read: {error!r}") from None

    def add(self, solution: Mapping[str, Any], spent: Mapping[str, Any]) -> None:
        """Writes a solution, `{"id", ...}`, and what the run has spent by now."""
        key = solution["id"]
        own = {"id": key, "num_samples": self._num_samples, "problem": self._problems[key]}
        self._write({**own, **solution, "spent": spent})

    def add_spent(self, spent: Mapping[str, Any]) -> None:
        """Writes what the run has spent by now, between two solutions."""
        self._write({"spent": spent})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._writing():
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            if time.monotonic() >= self._next_sync:
                os.fsync(self._file.fileno())
                self._next_sync = time.monotonic() + _SYNC_SECONDS

    def close(self) -> None:
        """Writes everything to the disk, and closes the file."""
        with self._writing():
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Adds the path to errors, of a full disk for instance, which do not have it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def samples_of_solutions(path: str | os.PathLike[str]) -> list[int | None]:
    """Reads how many samples the latest solution of each problem has; None = it has no such number.

    The journal may be of any run; where there is no file, it has no solutions.
    """
    if not os.path.exists(path):
        return []
    latest: dict[bytes, bytes] = {}
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(_SOLUTION) and line.endswith(b"\n"):
                key, _, rest = line.removeprefix(_SOLUTION).partition(_SAMPLES)
                latest[key] = rest.partition(b",")[0]
    return [int(number) if number.isdigit() else None for number in latest.values()]


def num_solutions(path: str | os.PathLike[str], num_samples: int | None = None) -> int:
    """Counts the problems that a journal has solutions of; with `num_samples`, those solutions of so many samples."""
    samples = samples_of_solutions(path)
    return len(samples) if num_samples is None else samples.count(num_samples)


def _change(key: str, old: Any, new: Any) -> str:
    words = _WORDS.get(key, key)
    return f"{words} differ" if key in _DIGESTS else f"{words} was {old} and is {new}"
