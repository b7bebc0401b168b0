"""Budget: limits on what a run, and each problem of it, may spend."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from treedecode.accounting.meter import BudgetExhausted, Meter
from treedecode.common.validation import number

# The time, by `time.monotonic`, at which the problem of this context has to end; None = no limit in seconds.
DEADLINE: ContextVar[float | None] = ContextVar("DEADLINE", default=None)


def require_time_left() -> None:
    """Checks that the problem's time is not up; to be called before anything that blocks the event loop.

    Raises:
        BudgetExhausted: the time is up.
    """
    deadline = DEADLINE.get()
    if deadline is not None and time.monotonic() >= deadline:
        raise BudgetExhausted("the time is up")


@dataclass(frozen=True)
class Budget:
    """Hard limits; a run ends with the forward that reaches one. None = no limit.

    Time passes outside of forwards too. When it is up, scorers that are waited for are cancelled (calls in threads, as
    of `TextScorer(workers=...)`, run to their ends), and a function that blocks is not called again: one such call is
    all by which a limit in seconds can be exceeded. The time of a problem begins when the run has branches for it, and
    passes while `DynamicAllocation` waits for others.

    A run that is resumed from a journal has the rest of its limits, time and energy included.

    Args:
        tokens: generated tokens, those of judges and dropped branches too.
        flops: floating-point operations, as `Spending.flops` counts them.
        kv_bytes: bytes of keys and values read, shared ones once a forward.
        joules: energy, where it can be measured (`EnergyCounter.is_available`).
        seconds: wall time.
        per_problem: limits of every single problem.

    Raises:
        TypeError: a limit is not a number (named).
        ValueError: a limit is not positive (named), or `per_problem` has limits that one problem cannot have.
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
            if not number(field.name, value) > 0:
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
        """Opens an account with these limits, whose time begins now.

        Args:
            energy: returns the joules since the account was opened; needed for a limit on them.
            seconds, joules: already spent of what the limits allow.

        Raises:
            ValueError: there is a limit on joules and no `energy`.
        """
        by_field = {"generated_tokens": self.tokens, "flops": self.flops, "kv_bytes": self.kv_bytes}
        limits: dict[str, Any] = {name: value for name, value in by_field.items() if value is not None}
        if self.seconds is None and self.joules is None:
            return meter.open(parent, **limits)
        if self.joules is not None and energy is None:
            raise ValueError("joules: energy cannot be measured on this machine, so no limit on it can be kept")
        begin, max_seconds, max_joules = time.monotonic() - seconds, self.seconds, self.joules

        def is_expired() -> bool:
            if max_seconds is not None and time.monotonic() - begin >= max_seconds:
                return True
            return max_joules is not None and energy is not None and joules + energy() >= max_joules

        return meter.open(parent, is_expired=is_expired, **limits)
