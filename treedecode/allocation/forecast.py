"""Forecast: quantiles of what a run will cost, from a gate that has read its prompts."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from treedecode.allocation.chain_costs import UNITS, kv_sizes
from treedecode.allocation.cost_quantiles import prompt_vector
from treedecode.allocation.cost_samples import CostDraws
from treedecode.allocation.features import Prefill, prefill
from treedecode.allocation.gate import Gate
from treedecode.common.arrays import IntArray
from treedecode.common.validation import one_of
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.search.strategy import Strategy

_SIDE_BY_SIDE = 64  # prompts computed at a time


@dataclass(frozen=True)
class Forecast:
    """What a run may cost.

    Attributes:
        unit: "tokens" generated, or "kv_bytes" read.
        draws: `[num_problems, num_draws]` float64, each column a way the run may go.
    """

    unit: str
    draws: np.ndarray

    def quantile(self, level: float | Sequence[float]) -> np.ndarray:
        """What the whole run stays within, with probability `level` (of its shape)."""
        return np.quantile(self.draws.sum(axis=0), level)

    def problem_quantile(self, level: float) -> np.ndarray:
        """`[num_problems]` the same of each problem alone."""
        return np.quantile(self.draws, level, axis=1)

    def within(self, limit: float) -> float:
        """P(the whole run costs no more than `limit`), the odds that such a budget is enough."""
        return float((self.draws.sum(axis=0) <= limit).mean())


def forecast(
    decoder: Decoder,
    prompts: Iterable[Prompt],
    *,
    strategy: Strategy,
    gate: Gate | str | os.PathLike[str] | None = None,
    unit: str = "tokens",
    num_draws: int = 1000,
    seed: int = 0,
) -> Forecast:
    """Quantiles of what a strategy will spend on problems, before it runs, by recalibrated quantile regression.

    The prompts are computed, and nothing is generated; a run on the same decoder finds them in the prefix index. How
    long chains will be is what the gate has learned from its training problems: of another task, another model or
    another sampling it says nothing. Nor is there a guarantee for theirs: a gate's figures have the share of held-out
    costs within the 95% that it names (`within_95`; of the countdown gate 92% of chains and 92% to 94% of searches).
    What a verifier generates or reads is not in it, and KV bytes are of every problem apart: what problems have in
    common, worked examples for instance, is read less often than that.

    Args:
        prompts: of the problems.
        strategy: one whose cost follows from how long chains are (of those that may stop early, and of dynamic
            allocation, what they spend at most), or a tree search of the gate's menu.
        gate: a gate or its file; by default the strategy's own.
        unit: "tokens" generated, or "kv_bytes" read.
        num_draws: ways the run may go that are drawn, from `seed`.

    Raises:
        FileNotFoundError, ValueError: nothing is known of the strategy, there is no gate, it is missing or another
            model's, or an argument is out of range (named). TypeError, ValueError: a prompt is wrong (named).
    """
    ids = decoder.prompt_ids(list(prompts))
    return forecasts(decoder, ids, strategy=strategy, gate=gate, units=[unit], num_draws=num_draws, seed=seed)[0]


def forecasts(
    decoder: Decoder,
    prompts: Sequence[IntArray],
    *,
    strategy: Strategy,
    gate: Gate | str | os.PathLike[str] | None = None,
    units: Sequence[str],
    num_draws: int = 1000,
    seed: int = 0,
) -> list[Forecast]:
    """`forecast` in several units, of prompts that are computed once for all of them.

    Args:
        prompts: token ids `[n]` of each, checked.

    Raises:
        FileNotFoundError, ValueError: as `forecast`.
    """
    gate = getattr(strategy, "gate", None) if gate is None else gate
    if isinstance(gate, (str, os.PathLike)):
        gate = Gate.load(gate)
    if not isinstance(gate, Gate):
        raise ValueError(f"gate: {strategy.name} has none of its own, so expected a Gate, got {gate!r}")
    for unit in units:
        one_of("unit", unit, tuple(UNITS))
    if num_draws < 1:
        raise ValueError(f"num_draws: expected at least 1, got {num_draws}")
    gate.check_model(decoder.model)
    costs, hidden_size = gate.costs, gate.config.hidden_size
    known = decoder.run(_prefills(decoder, prompts, wants_hidden=hidden_size > 0))
    quantiles = costs(np.stack([prompt_vector(prompt, hidden_size) for prompt in known]))
    factors, sizes = costs.factors.numpy(), kv_sizes(decoder)
    found = []
    for unit in units:
        rng = np.random.default_rng(seed)
        errors = rng.normal(size=(num_draws, len(costs.errors))) * costs.errors.numpy()
        drawn = factors * (1 + errors).clip(min=0)
        draws = [
            strategy.cost(CostDraws(gate, prompt, some, drawn, unit=unit, rng=rng, **sizes))
            for prompt, some in zip(known, quantiles, strict=True)
        ]
        found.append(Forecast(unit, np.stack(draws)))
    return found


async def _prefills(decoder: Decoder, prompts: Sequence[IntArray], *, wants_hidden: bool) -> list[Prefill]:
    found: list[Prefill] = []
    for begin in range(0, len(prompts), _SIDE_BY_SIDE):
        some = list(prompts[begin : begin + _SIDE_BY_SIDE])
        with await decoder.roots(some) as root:
            found += await prefill(root, wants_hidden=wants_hidden)
    return found
