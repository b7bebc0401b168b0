"""Rows: measures a strategy on the problems of a study, and compares it with the baseline."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
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
    """A row of the plan: a strategy by name, so that a missing or a misconfigured one fails its row and not the study.

    Attributes:
        key: names the row's files.
        label: for people.
        strategy: a name in `STRATEGIES`, or "chain_pool".
        settings: of the strategy.
        chains: further settings, which the strategy has in tokens, in multiples of the baseline's mean chain.
        curve: entries with the same curve are its budgets.

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
        """Makes the strategy.

        Args:
            chain_tokens: of the baseline's mean chain.
            room: the most tokens of a solution before its answer, which limits the settings in `chains`.

        Raises:
            TypeError: a setting is of another type, or unknown.
            ValueError: there is no strategy of that name, or a setting is out of range.
        """
        strategies = {**STRATEGIES, ChainPool.name: ChainPool}
        if self.strategy not in strategies:
            raise ValueError(f"strategy: expected one of {', '.join(sorted(strategies))}, got {self.strategy!r}")
        scaled = {name: min(max(1, round(multiple * chain_tokens)), room) for name, multiple in self.chains.items()}
        return strategies[self.strategy](**self.settings, **scaled)


@dataclass(frozen=True)
class Conditions:
    """The conditions that all rows of a study have in common.

    Attributes:
        decoder: runs the strategies.
        unshared: runs the same strategies with branches one after another over copied caches (`UnsharedDecoder`).
        latency_problems: number of problems, from the first on, that are also solved one at a time to be timed.
        prompt, verifier, sampling, seed: as in `solve_async`.
    """

    decoder: Decoder
    unshared: Decoder
    task: Task
    problems: Sequence[Problem]
    verifier: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    latency_problems: int = 6
    prompt: Callable[[Problem], Prompt] | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The text that the model reads for each problem."""
        return [self.prompt(problem) if self.prompt else problem.prompt for problem in self.problems]

    @property
    def room(self) -> int:
        """Tokens that the model has for every problem, with a short forced answer after them."""
        longest = max(len(self.decoder.encode(p)) if isinstance(p, str) else len(p) for p in self.prompts)
        return self.decoder.model.max_position - longest - 2 * ANSWER_TOKENS

    async def solve(self, decoder: Decoder, problems: Sequence[Problem], strategy: Strategy, **settings: Any) -> Result:
        """Runs `solve_async` from a cold start, so that no row finds prompts that another has computed."""
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
    """The times of a row, on the wall clock.

    Attributes:
        is_resumed: the batched run was interrupted, so that fewer problems ran side by side and searches began anew.
        batched_seconds: of all problems side by side.
        busy_seconds: of these, the seconds in which the decoder worked.
        joules: of all problems; None = not measured.
        energy_source: the counter, or the reason why there is none.
        latencies: `[latency_problems]` seconds of one problem at a time; `[]` for a pool of chains.
        unshared_latencies: the same for the unshared baseline.
        unshared_tokens: tokens generated by the unshared baseline, of each of these problems.
        same_texts: both gave the same solutions.
    """

    is_resumed: bool
    batched_seconds: float
    busy_seconds: float
    joules: float | None
    energy_source: str
    latencies: list[float]
    unshared_latencies: list[float]
    unshared_tokens: list[int]
    same_texts: bool

    def save(self, path: Path) -> None:
        """Writes a JSON file."""
        data = {_TIMING_KEYS.get(name, name): value for name, value in asdict(self).items()}
        path.write_text(json.dumps({"schema": SCHEMA, **data}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Timing":
        """Loads the times that `save` wrote.

        Raises:
            ValueError: the file has another schema.
        """
        data = json.loads(path.read_text())
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path}: expected the schema {SCHEMA}")
        return cls(**{field.name: data[_TIMING_KEYS.get(field.name, field.name)] for field in fields(cls)})


# attributes that files know by another name
_TIMING_KEYS = {"latencies": "alone", "unshared_latencies": "serial", "unshared_tokens": "serial_tokens"}


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
        """Spending on all problems; what problems share in one forward counts for each, whichever ran side by side."""
        return sum((solution.spending for solution in self.solutions), Spending())

    @property
    def tokens(self) -> float:
        """Generated tokens per problem."""
        return self.spending.generated_tokens / len(self.solutions)


async def measure(
    conditions: Conditions, entry: Entry, folder: Path, chain_tokens: float, callback: Callable[[Solution], None]
) -> Measured:
    """Measures a row: all problems side by side, then some alone, shared and unshared.

    Solutions and times that `folder` has of the row are not measured again.

    Raises:
        TypeError: as `Entry.build`.
        ValueError: as `Entry.build`, or the folder's journal is another run's.
        Exception: of a strategy or a verifier.
    """
    strategy = entry.build(chain_tokens, conditions.room)
    journal, times = folder / f"{entry.key}.jsonl", folder / f"{entry.key}.timing.json"
    num_recorded = num_solutions(journal)
    result = await conditions.solve(
        conditions.decoder, conditions.problems, strategy, journal=str(journal), callback=callback
    )
    if times.exists():
        return Measured(entry, strategy, result.solutions, Timing.load(times))
    num_timed = 0 if isinstance(strategy, ChainPool) else conditions.latency_problems
    latencies, unshared, tokens, same = await _time_alone(conditions, strategy, conditions.problems[:num_timed])
    ledger = result.ledger
    timing = Timing(
        is_resumed=0 < num_recorded < len(conditions.problems) or ledger.lost_tokens > 0,
        batched_seconds=ledger.total_seconds,
        busy_seconds=ledger.busy_seconds,
        joules=ledger.joules,
        energy_source=ledger.energy_source,
        latencies=latencies,
        unshared_latencies=unshared,
        unshared_tokens=tokens,
        same_texts=same,
    )
    timing.save(times)
    return Measured(entry, strategy, result.solutions, timing)


async def _time_alone(
    conditions: Conditions, strategy: Strategy, problems: Sequence[Problem]
) -> tuple[list[float], list[float], list[int], bool]:
    """Solves problems one at a time, shared and unshared.

    Returns:
        (seconds; seconds of the unshared baseline; its tokens; true if both gave the same texts).
    """
    latencies, unshared_latencies, unshared_tokens, same_texts = [], [], [], True
    for problem in problems:
        shared = await conditions.solve(conditions.decoder, [problem], strategy)
        unshared = await conditions.solve(conditions.unshared, [problem], strategy)  # right after, under the same load
        latencies.append(shared.ledger.total_seconds)
        unshared_latencies.append(unshared.ledger.total_seconds)
        unshared_tokens.append(unshared.ledger.total.generated_tokens)
        same_texts &= shared.solutions[0].text == unshared.solutions[0].text
    return latencies, unshared_latencies, unshared_tokens, same_texts


def row(measured: Measured, baseline: Measured) -> dict[str, Any]:
    """Returns the row of a strategy as JSON; fields in `_x` are over the baseline's (`docs/study.md` explains each)."""
    n, timing, first = len(measured.solutions), measured.timing, baseline.timing
    correct, spent, unit = measured.correct, measured.spending, baseline.spending
    accuracy, tokens_x = float(correct.mean()), _over(measured.tokens, baseline.tokens)
    latency = median(timing.latencies) if timing.latencies else None
    batched = timing.batched_seconds / n
    rate = _over(measured.tokens, batched)
    joules = None if timing.joules is None else timing.joules / n
    unit_joules = None if first.joules is None else first.joules / n
    difference = changed = None
    if measured is not baseline:
        difference = paired_difference(correct, baseline.correct)._asdict()
        pairs = zip(measured.solutions, baseline.solutions, strict=True)
        changed = sum(solution.answer != base.answer for solution, base in pairs)
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
        "latency_s": latency,
        "latency_x": _over(latency, median(first.latencies) if first.latencies else None),
        "batched_s": batched,
        "tokens_per_s": rate,
        "occupancy": timing.busy_seconds / timing.batched_seconds,
        "one_after_another": _unshared(timing, latency, rate),
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
    """Computes the accuracy gained per unit of compute added: (accuracy - baseline) / (multiplier - 1).

    None where no compute was added.

    Args:
        multiplier: compute over the baseline's.
    """
    return (accuracy - baseline) / (multiplier - 1) if multiplier > 1 else None


def _budget(strategy: Strategy) -> float | None:
    """Returns the mean tokens that a problem may cost, in multiples of a chain's; None = the strategy has no budget."""
    return float(strategy.budget) if isinstance(strategy, DynamicAllocation) and strategy.unit == "tokens" else None


def _passes(measured: Measured) -> float | None:
    """Counts the revisions per problem of iterative refinement; each adds a solution to the first."""
    if not isinstance(measured.strategy, IterativeRefinement):
        return None
    return mean(len(solution.tree.leaves()) - 1 for solution in measured.solutions)


def heading(entry: Entry) -> dict[str, Any]:
    """Returns the fields of a row that a failed one has too."""
    return {"key": entry.key, "label": entry.label, "strategy": entry.strategy, "curve": entry.curve}


def _unshared(timing: Timing, latency: float | None, rate: float | None) -> dict[str, Any] | None:
    """Returns the figures of the unshared baseline.

    Args:
        latency: of the shared search, seconds.
        rate: of the batched run, tokens per second.
    """
    seconds = timing.unshared_latencies
    if not seconds:
        return None
    unshared_rate = _over(sum(timing.unshared_tokens), sum(seconds))
    return {
        "problems": len(seconds),
        "latency_s": median(seconds),
        "latency_ratio": _over(median(seconds), latency),
        "per_problem_s": mean(seconds),
        "tokens": mean(timing.unshared_tokens),
        "tokens_per_s": unshared_rate,
        "throughput_ratio": _over(rate, unshared_rate),
        "same_texts": timing.same_texts,
    }


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or not unit else float(value) / float(unit)
