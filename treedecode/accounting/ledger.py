"""Ledger: what a run has spent, beside what it would have without sharing."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from treedecode.accounting.meter import Spending

SCHEMA = "treedecode.ledger/1"


@dataclass(frozen=True)
class Spent:
    """What a run has spent as a whole, up to some moment; adds up over the processes that worked on it.

    Attributes:
        spending: of all searches; what they share in one forward counts once.
        seconds, busy_seconds, joules, energy_source: as in `Ledger`.
    """

    spending: Spending
    seconds: float
    busy_seconds: float
    joules: float | None
    energy_source: str

    def __add__(self, other: "Spent") -> "Spent":
        """Both processes; energy is known where both measured it, else the source says what is missing."""
        known = self.joules is not None and other.joules is not None
        sources = [one.energy_source for one in (self, other) if known or one.joules is None]
        return Spent(
            self.spending + other.spending,
            self.seconds + other.seconds,
            self.busy_seconds + other.busy_seconds,
            self.joules + other.joules if self.joules is not None and other.joules is not None else None,
            ", ".join(dict.fromkeys(sources)),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Spent":
        """What `asdict` described."""
        return cls(**{**data, "spending": Spending(**data["spending"])})


@dataclass(frozen=True)
class Ledger:
    """What a run has spent, in all processes that worked on it.

    Attributes:
        problems: by problem id. Pages that problems share (worked examples) count for each of them.
        total: of all problems, and of searches that were under way when the run was interrupted, which were begun anew;
            what they share in one forward counts once.
        seconds: wall time, by problem id; problems run side by side, so these overlap.
        total_seconds: wall time of the run.
        busy_seconds: of which the decoder was in a forward or its book-keeping.
        joules: energy; None = not measured.
        energy_source: the counter it is from, or why there is none.
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
        """Share of the run's wall time in which the decoder worked."""
        return self.busy_seconds / self.total_seconds if self.total_seconds else 0.0

    @property
    def lost_tokens(self) -> int:
        """Generated tokens of searches that were under way when the run was interrupted: in the total alone."""
        return self.total.generated_tokens - sum(spent.generated_tokens for spent in self.problems.values())

    def to_json(self) -> dict[str, Any]:
        """`{"schema", "problems": {id: {..., "seconds", "without_sharing"}}, "total", ...}`; all of `Spending`."""
        return {
            "schema": SCHEMA,
            "problems": {
                key: {**_described(spent), "seconds": self.seconds[key]} for key, spent in self.problems.items()
            },
            "total": _described(self.total),
            "total_seconds": self.total_seconds,
            "busy_seconds": self.busy_seconds,
            "joules": self.joules,
            "energy_source": self.energy_source,
        }


def _described(spent: Spending) -> dict[str, Any]:
    values = asdict(spent)
    apart = {
        "kv_bytes": values.pop("kv_bytes_copied"),
        "forwards": values.pop("branch_forwards"),
        "peak_pages": values.pop("peak_pages_copied"),
    }
    return {**values, "without_sharing": apart}
