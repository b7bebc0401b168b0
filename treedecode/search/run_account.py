"""Counts what a run spends, over all processes that work on it."""

import time
from dataclasses import replace

from treedecode.accounting.budget import DEADLINE, Budget
from treedecode.accounting.energy import EnergyCounter
from treedecode.accounting.ledger import RunSpending
from treedecode.accounting.meter import Spending
from treedecode.decoding.decoder import Decoder


class RunAccount:
    """The account that the problems of a run are paid from, its clock and its energy counter.

    Attributes:
        id: of the account in the decoder's meter; -1 = not open.

    Raises:
        ValueError: the budget limits joules, and energy is not measured.
    """

    def __init__(self, decoder: Decoder, budget: Budget) -> None:
        self._decoder, self._budget = decoder, budget
        self._energy = EnergyCounter(decoder.pool.device)
        if budget.joules is not None and not self._energy.is_available:
            raise ValueError(f"budget: joules are limited, and energy is {self._energy.source}")
        self.id = -1
        self._earlier: RunSpending | None = None
        self._begin = self._begin_busy = 0.0

    def open(self, earlier: RunSpending | None) -> None:
        """Opens the account, and starts the clock.

        Args:
            earlier: what earlier processes have spent, which counts against the budget; None = there were none.
        """
        meter = self._decoder.meter
        energy = self._energy.joules if self._energy.is_available else None
        if earlier is None:
            self.id = self._budget.open(meter, energy=energy)
        else:
            if earlier.joules is None:
                energy = None  # of which only a part would be known
            joules = earlier.joules or 0.0
            self.id = self._budget.open(meter, energy=energy, seconds=earlier.seconds, joules=joules)
            meter.add(self.id, earlier.spending)
        self._earlier = earlier
        self._begin, self._begin_busy = time.perf_counter(), self._decoder.stats.busy_seconds

    def close(self) -> None:
        """Closes the account."""
        self._decoder.meter.close(self.id)

    def spent(self) -> RunSpending:
        """Returns what all processes have spent by now."""
        spent = RunSpending(
            Spending(),
            time.perf_counter() - self._begin,
            self._decoder.stats.busy_seconds - self._begin_busy,
            self._energy.joules() if self._energy.is_available else None,
            self._energy.source,
        )
        if self._earlier is not None:
            spent = self._earlier + spent
        return replace(spent, spending=self._decoder.meter.spending(self.id))

    def deadline(self, problem_budget: Budget) -> float | None:
        """Returns when a problem that begins now has to end, by `time.monotonic`; None = no limit in seconds."""
        now = time.monotonic()
        deadlines = [DEADLINE.get()]  # of an outer run, where this one is part of its verifier
        if self._budget.seconds is not None:
            earlier = 0.0 if self._earlier is None else self._earlier.seconds
            deadlines.append(now + self._budget.seconds - earlier - (time.perf_counter() - self._begin))
        if problem_budget.seconds is not None:
            deadlines.append(now + problem_budget.seconds)
        return min((deadline for deadline in deadlines if deadline is not None), default=None)
