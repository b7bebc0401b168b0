"""Ledger: what a run has spent, and what it would have spent without sharing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from treedecode.accounting.meter import Spending

SCHEMA = "treedecode.ledger/1"


@dataclass(frozen=True)
class RunSpending:
    """The work, time and energy of a whole run up to some moment; adds up over the processes that worked on it.

    Attributes:
        spending: of all searches; what they share in one forward counts once.
        seconds, busy_seconds, joules, energy_source: as in `Ledger`.
    """

    spending: Spending
    seconds: float
    busy_seconds: float
    joules: float | None
    energy_source: str

    def __add__(self, other: "RunSpending") -> "RunSpending":
        """Adds two processes. Energy needs both measurements; without, the source says which one is missing."""
        joules = None if self.joules is None or other.joules is None else self.joules + other.joules
        sources = [part.energy_source for part in (self, other) if joules is not None or part.joules is None]
        return RunSpending(
            self.spending + other.spending,
            self.seconds + other.seconds,
            self.busy_seconds + other.busy_seconds,
            joules,
            ", ".join(dict.fromkeys(sources)),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunSpending":
        """Restores an object from the dictionary that `asdict` made of it."""
        return cls(**{**data, "spending": Spending(**data["spending"])})


@dataclass(frozen=True)
class Ledger:
    """The work, time and energy of a run, in all processes that worked on it.

    Attributes:
        problems: by problem id. Pages that problems share (worked examples) count for each of them.
        total: of all problems, and of searches that an interruption cut off and that were begun anew; what they share
            in one forward counts once.
        seconds: wall time, by problem id; problems run side by side, so these overlap.
        total_seconds: wall time of the run.
        busy_seconds: the part of it in which the decoder ran forwards or kept its books.
        joules: energy; None = not measured.
        energy_source: "nvml", "rapl", or the reason why energy is not measured.
    """

    problems: dict[str, Spending]
    total: Spending
    seconds: dict[str, float]
    total_seconds: float
    busy_seconds: float
    joules: float | None
    energy_source: str

    @property
    def occupancy(self) -> float:
        """The share of the run's wall time in which the decoder was busy."""
        return self.busy_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def lost_tokens(self) -> int:
        """Generated tokens of searches that an interruption cut off; only the total counts them."""
        return self.total.generated_tokens - sum(spent.generated_tokens for spent in self.problems.values())

    def to_json(self) -> dict[str, Any]:
        """Converts to `{"schema", "problems": {id: {..., "seconds", "without_sharing"}}, "total", ...}`."""
        return {
            "schema": SCHEMA,
            "problems": {
                key: {**_to_json(spending), "seconds": self.seconds[key]} for key, spending in self.problems.items()
            },
            "total": _to_json(self.total),
            "total_seconds": self.total_seconds,
            "busy_seconds": self.busy_seconds,
            "joules": self.joules,
            "energy_source": self.energy_source,
        }


def _to_json(spending: Spending) -> dict[str, Any]:
    values = asdict(spending)
    without_sharing = {
        "kv_bytes": values.pop("kv_bytes_copied"),
        "forwards": values.pop("branch_forwards"),
        "peak_pages": values.pop("peak_pages_copied"),
    }
    return {**values, "without_sharing": without_sharing}
