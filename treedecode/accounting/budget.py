"""Budget: what a run, and each problem of it, may spend."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from treedecode.accounting.meter import BudgetExhausted, Meter

# When the problem of this context has to end, by `time.monotonic`; None = no limit in seconds.
UNTIL: ContextVar[float | None] = ContextVar("UNTIL", default=None)


def require_time() -> None:
    """Raises BudgetExhausted if the time is up: what blocks the event loop is to be called after this."""
    until = UNTIL.get()
    if until is not None and time.monotonic() >= until:
        raise BudgetExhausted("the time is up")


@dataclass(frozen=True)
class Budget:
    """Hard limits; a run never goes on by more than the forward that reached one. None = no limit.

    Time passes outside of forwards too. When it is up, scorers that are waited for are given up (of those in threads,
    `TextScorer(workers=...)` for instance, calls under way go on to their ends); a function that blocks is not called
    again, and how long one call takes is how far a limit in seconds can be exceeded. The time of a problem begins when
    the run has branches for it, and goes on while `DynamicAllocation` waits for others.

    A run that goes on from a journal has what is left of its limits, time and energy too.

    Args:
        tokens: generated tokens, those of judges and dropped branches too.
        flops: floating-point operations, as `Spending.flops` counts them.
        kv_bytes: bytes of keys and values read, shared ones once a forward.
        joules: energy, where it can be measured (`energy.source()`).
        seconds: wall time.
        per_problem: the same for every problem alone.

    Raises:
        TypeError, ValueError: a limit is not a positive number (named).
    """

    tokens: float | None = None
    flops: float | None = None
    kv_bytes: float | None = None
    joules: float | None = None
    seconds: float | None = None
    per_problem: "Budget | None" = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "per_problem":
                if not isinstance(value, Budget):
                    raise TypeError(f"per_problem: expected a Budget, got {value!r}")
                if value.per_problem is not None:
                    raise ValueError("per_problem: is itself the budget of one problem and has none per problem")
                if value.joules is not None:
                    raise ValueError("per_problem: energy is measured of a whole run, not of a problem in it")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name}: expected a number, got {value!r}")
            if not value > 0:
                raise ValueError(f"{field.name}: expected more than 0, got {value}")

    def open(
        self,
        meter: Meter,
        parent: int = -1,
        *,
        energy: Callable[[], float] | None = None,
        seconds: float = 0.0,
        joules: float = 0.0,
    ) -> int:
        """An account with these limits, whose time begins now.

        Args:
            energy: joules since the account was opened; needed for a limit on them.
            seconds, joules: spent before, of what the limits allow.

        Raises:
            ValueError: there is a limit on joules and no `energy`.
        """
        named = {"generated_tokens": self.tokens, "flops": self.flops, "kv_bytes": self.kv_bytes}
        limits: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.seconds is None and self.joules is None:
            return meter.open(parent, **limits)
        if self.joules is not None and energy is None:
            raise ValueError("joules: energy cannot be measured on this machine, so no limit on it can be kept")
        begin, until, most = time.monotonic() - seconds, self.seconds, self.joules

        def ended() -> bool:
            if until is not None and time.monotonic() - begin >= until:
                return True
            return most is not None and energy is not None and joules + energy() >= most

        return meter.open(parent, ended=ended, **limits)
