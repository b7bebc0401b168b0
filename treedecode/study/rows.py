"""Rows: a strategy on the problems of a study, what came of it and what it cost, beside the baseline."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from treedecode.accounting.meter import Spending
from treedecode.common.arrays import FloatArray
from treedecode.common.intervals import mean_interval, paired_difference
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.engine.sampling import Sampling
from treedecode.search.journal import num_solutions
from treedecode.search.solutions import Result, Solution
from treedecode.search.solve import solve_async
from treedecode.strategies import STRATEGIES, DynamicAllocation, IterativeRefinement, Strategy
from treedecode.study.pool import ChainPool
from treedecode.tasks.base import Problem, Task

SCHEMA = "treedecode.study.timing/3"
ANSWER_TOKENS = 8  # of an answer that is forced at the end of a long chain


@dataclass(frozen=True)
class Entry:
    """A row to be: a strategy by name, so that one that is missing or badly set is a failed row and no failed study.

    Attributes:
        key: names the row's files.
        label: for people.
        strategy: a name in `STRATEGIES`, or "chain_pool".
        settings: of the strategy.
        chains: settings given in tokens, here in multiples of the baseline's mean chain.
        curve: entries with the same one are budgets of one curve.

    Raises:
        ValueError: the key cannot name a file.
    """

    key: str
    label: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    chains: Mapping[str, float] = field(default_factory=dict)
    curve: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.key):
            raise ValueError(f"key: expected lower-case letters, digits and _, got {self.key!r}")

    def build(self, chain_tokens: float, room: int) -> Strategy:
        """The strategy.

        Args:
            chain_tokens: of the baseline's mean chain.
            room: the most tokens a solution may have before its answer, for settings in `chains`.

        Raises:
            ValueError, TypeError: there is none of that name, or it does not take the settings.
        """
        kinds = {**STRATEGIES, ChainPool.name: ChainPool}
        if self.strategy not in kinds:
            raise ValueError(f"strategy: expected one of {', '.join(sorted(kinds))}, got {self.strategy!r}")
        scaled = {name: min(max(1, round(multiple * chain_tokens)), room) for name, multiple in self.chains.items()}
        return kinds[self.strategy](**self.settings, **scaled)


@dataclass(frozen=True)
class Conditions:
    """What all rows of a study have in common.

    Attributes:
        decoder: runs them; `serial`: takes branches one after another over copied caches (`one_after_another`).
        latency_problems: how many problems, from the first on, are solved one at a time to be timed.
        prompt, verifier, sampling, seed: as in `solve_async`.
    """

    decoder: Decoder
    serial: Decoder
    task: Task
    problems: Sequence[Problem]
    verifier: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    latency_problems: int = 6
    prompt: Callable[[Problem], Prompt] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """What the model reads for each problem."""
        return [self.prompt(problem) if self.prompt else problem.prompt for problem in self.problems]

    @property
    def room(self) -> int:
        """Tokens that the model has for every problem, with a short forced answer after them."""
        longest = max(len(self.decoder.encode(p)) if isinstance(p, str) else len(p) for p in self.prompts)
        return self.decoder.model.max_position - longest - 2 * ANSWER_TOKENS

    async def solve(self, decoder: Decoder, problems: Sequence[Problem], strategy: Strategy, **settings: Any) -> Result:
        """`solve_async` from a cold start: no row finds prompts that another has computed."""
        decoder.forget()
        return await solve_async(
            decoder,
            problems,
            strategy=strategy,
            task=self.task,
            verifier=self.verifier,
            sampling=self.sampling,
            seed=self.seed,
            prompt=self.prompt,
            **settings,
        )


@dataclass(frozen=True)
class Timing:
    """What was timed of a row, on the wall clock.

    Attributes:
        is_resumed: the batched run was interrupted, so that fewer problems ran side by side and searches began anew.
        batched_seconds, busy_seconds: of all problems side by side, and of that in the decoder.
        joules: of all problems; None = not measured.
        energy_source: the counter, or why there is none.
        alone: `[latency_problems]` seconds of one problem at a time; `[]` for a pool of chains, which is no strategy.
        serial: the same, branches one after another over copied caches.
        serial_tokens: tokens generated in that, of each problem.
        same_texts: whether both gave the same solutions.
    """

    is_resumed: bool
    batched_seconds: float
    busy_seconds: float
    joules: float | None
    energy_source: str
    alone: list[float]
    serial: list[float]
    serial_tokens: list[int]
    same_texts: bool


@dataclass(frozen=True)
class Measured:
    """A strategy's solutions of all problems, and its times."""

    entry: Entry
    strategy: Strategy
    solutions: list[Solution]
    timing: Timing

    @property
    def correct(self) -> FloatArray:
        """`[problems]`, 1 where the solution is right."""
        return np.array([bool(solution.correct) for solution in self.solutions], np.float64)

    @property
    def spending(self) -> Spending:
        """Of all problems; what problems share in one forward counts for each, so it is no matter of the batch."""
        return sum((solution.spending for solution in self.solutions), Spending())

    @property
    def tokens(self) -> float:
        """Generated tokens per problem."""
        return self.spending.generated_tokens / len(self.solutions)


async def measure(
    conditions: Conditions, entry: Entry, folder: Path, chain_tokens: float, callback: Callable[[Solution], None]
) -> Measured:
    """Runs a row: all problems side by side, then some alone, in both ways. What `folder` has of it is not run again.

    Raises:
        ValueError, TypeError: the strategy is wrong, or the folder's journal is another run's.
        Exception: of a strategy or a verifier.
    """
    strategy = entry.build(chain_tokens, conditions.room)
    journal, times = folder / f"{entry.key}.jsonl", folder / f"{entry.key}.timing.json"
    num_known = num_solutions(journal)
    result = await conditions.solve(
        conditions.decoder, conditions.problems, strategy, journal=str(journal), callback=callback
    )
    if times.exists():
        timing = _load(times)
    else:
        num_timed = 0 if isinstance(strategy, ChainPool) else conditions.latency_problems
        alone, serial, tokens, same = await _times_alone(conditions, strategy, conditions.problems[:num_timed])
        ledger = result.ledger
        timing = Timing(
            is_resumed=0 < num_known < len(conditions.problems) or ledger.lost_tokens > 0,
            batched_seconds=ledger.total_seconds,
            busy_seconds=ledger.busy_seconds,
            joules=ledger.joules,
            energy_source=ledger.energy_source,
            alone=alone,
            serial=serial,
            serial_tokens=tokens,
            same_texts=same,
        )
        times.write_text(json.dumps({"schema": SCHEMA, **asdict(timing)}) + "\n")
    return Measured(entry, strategy, result.solutions, timing)


async def _times_alone(
    conditions: Conditions, strategy: Strategy, problems: Sequence[Problem]
) -> tuple[list[float], list[float], list[int], bool]:
    """(seconds per problem; seconds and tokens with branches one after another; whether the texts are the same)."""
    alone, serial, tokens, same = [], [], [], True
    for problem in problems:
        ours = await conditions.solve(conditions.decoder, [problem], strategy)
        other = await conditions.solve(conditions.serial, [problem], strategy)  # right after, under the same load
        alone.append(ours.ledger.total_seconds)
        serial.append(other.ledger.total_seconds)
        tokens.append(other.ledger.total.generated_tokens)
        same &= ours.solutions[0].text == other.solutions[0].text
    return alone, serial, tokens, same


def _load(path: Path) -> Timing:
    data = json.loads(path.read_text())
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: expected the schema {SCHEMA}")
    return Timing(**data)


def row(measured: Measured, baseline: Measured) -> dict[str, Any]:
    """The row of a strategy as JSON; `_x` is over the baseline's. `docs/study.md` says what each field is."""
    n, timing, first = len(measured.solutions), measured.timing, baseline.timing
    correct, spent, unit = measured.correct, measured.spending, baseline.spending
    accuracy, tokens_x = float(correct.mean()), _over(measured.tokens, baseline.tokens)
    alone = median(timing.alone) if timing.alone else None
    batched = timing.batched_seconds / n
    rate = _over(measured.tokens, batched)
    joules = None if timing.joules is None else timing.joules / n
    unit_joules = None if first.joules is None else first.joules / n
    difference = changed = None
    if measured is not baseline:
        difference = paired_difference(correct, baseline.correct)._asdict()
        pairs = zip(measured.solutions, baseline.solutions, strict=True)
        changed = sum(one.answer != other.answer for one, other in pairs)
    num_right = float(correct.sum())
    return {
        **heading(measured.entry),
        "settings": repr(measured.strategy),
        "problems": n,
        "accuracy": accuracy,
        "accuracy_ci": list(mean_interval(correct)),
        "over_baseline": difference,
        "changed_answers": changed,
        "tokens": measured.tokens,
        "tokens_x": tokens_x,
        "flops_x": _over(spent.flops, unit.flops),
        "kv_bytes_x": _over(spent.kv_bytes, unit.kv_bytes),
        "kv_bytes_copied_x": _over(spent.kv_bytes_copied, unit.kv_bytes),
        "joules": joules,
        "joules_x": _over(joules, unit_joules),
        "energy_source": timing.energy_source,
        "latency_s": alone,
        "latency_x": _over(alone, median(first.alone) if first.alone else None),
        "batched_s": batched,
        "tokens_per_s": rate,
        "occupancy": timing.busy_seconds / timing.batched_seconds,
        "one_after_another": _one_after_another(timing, alone, rate),
        "cost_per_correct": {
            "tokens": _over(spent.generated_tokens, num_right),
            "flops": _over(spent.flops, num_right),
            "seconds": _over(timing.batched_seconds, num_right),
        },
        "efficiency_ratio": None if tokens_x is None else efficiency_ratio(accuracy, baseline.correct.mean(), tokens_x),
        "budget": _budget(measured.strategy),
        "passes": _passes(measured),
        "num_cut": sum(solution.is_cut for solution in measured.solutions),
        "is_resumed": timing.is_resumed,
        "correct": correct.astype(int).tolist(),
        "error": None,
    }


def efficiency_ratio(accuracy: float, baseline: float, multiplier: float) -> float | None:
    """Accuracy gained per unit of compute added: (accuracy - baseline) / (multiplier - 1).

    None where no compute was added, which leaves nothing to divide by.

    Args:
        multiplier: compute over the baseline's.
    """
    return (accuracy - baseline) / (multiplier - 1) if multiplier > 1 else None


def _budget(strategy: Strategy) -> float | None:
    """What a problem may cost on average, in multiples of a chain's tokens; None = nothing says."""
    return float(strategy.budget) if isinstance(strategy, DynamicAllocation) and strategy.unit == "tokens" else None


def _passes(measured: Measured) -> float | None:
    """Revisions per problem of iterative refinement: each leaves a solution of its own beside the first."""
    if not isinstance(measured.strategy, IterativeRefinement):
        return None
    return mean(len(solution.tree.leaves()) - 1 for solution in measured.solutions)


def heading(entry: Entry) -> dict[str, Any]:
    """What a row says even if it failed."""
    return {"key": entry.key, "label": entry.label, "strategy": entry.strategy, "curve": entry.curve}


def _one_after_another(timing: Timing, alone: float | None, rate: float | None) -> dict[str, Any] | None:
    """What was timed one branch after another; `rate` is the batched run's, tokens per second."""
    if not timing.serial:
        return None
    latency, serial_rate = median(timing.serial), _over(sum(timing.serial_tokens), sum(timing.serial))
    return {
        "problems": len(timing.serial),
        "latency_s": latency,
        "latency_ratio": _over(latency, alone),
        "per_problem_s": mean(timing.serial),
        "tokens": mean(timing.serial_tokens),
        "tokens_per_s": serial_rate,
        "throughput_ratio": _over(rate, serial_rate),
        "same_texts": timing.same_texts,
    }


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else float(value) / float(unit)
