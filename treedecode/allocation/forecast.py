"""Forecasts the cost of a run, from a gate that has read its prompts."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from treedecode.allocation.chain_costs import UNITS, kv_sizes
from treedecode.allocation.cost_quantiles import prompt_vector
from treedecode.allocation.cost_samples import GateCostSamples
from treedecode.allocation.features import PromptFeatures, prompt_features
from treedecode.allocation.gate import Gate
from treedecode.common.arrays import IntArray
from treedecode.common.validation import one_of
from treedecode.decoding.decoder import Decoder, Prompt
from treedecode.search.strategy import Strategy

_PROMPTS_AT_A_TIME = 64


@dataclass(frozen=True)
class Forecast:
    """Samples of the cost of a run.

    Attributes:
        unit: "tokens" generated, or "kv_bytes" read.
        draws: `[num_problems, num_draws]` float64 costs; a column is one way that the run may go.
    """

    unit: str
    draws: np.ndarray

    def quantile(self, level: float | Sequence[float]) -> np.ndarray:
        """Returns the cost that the whole run stays within with probability `level`; of the shape of `level`."""
        return np.quantile(self.draws.sum(axis=0), level)

    def problem_quantile(self, level: float) -> np.ndarray:
        """Returns the costs `[num_problems]` that each problem stays within with probability `level`."""
        return np.quantile(self.draws, level, axis=1)

    def within(self, limit: float) -> float:
        """Returns P(the whole run costs no more than `limit`)."""
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
    """Forecasts the cost of a strategy on problems before it runs, by recalibrated quantile regression.

    The prompts are computed and nothing is generated; a run on the same decoder finds them in the prefix index. The
    gate has learned the lengths of chains from its training problems, and knows nothing of another task, model or
    sampling. There is no guarantee for its own task either: a gate's figures have the share of held-out costs within
    the 95% that it predicts (`within_95`; for the countdown gate 92% of chains and 92% to 94% of searches). The
    forecast leaves out what a verifier generates or reads. It counts the KV bytes of every problem apart, although
    prefixes that problems have in common, worked examples for instance, are read less often than that.

    Args:
        prompts: of the problems.
        strategy: one whose cost follows from the lengths of chains, or a tree search of the gate's menu. For one that
            may stop early, and for dynamic allocation, the forecast is of the most that it spends.
        gate: a gate or its file; None = the strategy's own.
        unit: "tokens" generated, or "kv_bytes" read.
        num_draws: samples of the cost, drawn from `seed`.

    Raises:
        FileNotFoundError: the gate's file is missing.
        TypeError: a prompt is wrong (named).
        ValueError: nothing is known of the strategy, there is no gate or it is another model's, or an argument is out
            of range (named).
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
    """Makes a `forecast` in each of several units; prompts are computed once for all of them.

    Args:
        prompts: token ids `[n]` of each, checked.

    Raises:
        FileNotFoundError: as `forecast`.
        ValueError: as `forecast`.
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
    features = decoder.run(_read_prompts(decoder, prompts, wants_hidden=hidden_size > 0))
    quantiles = costs(np.stack([prompt_vector(prompt, hidden_size) for prompt in features]))
    mean_factors, errors, sizes = costs.factors.numpy(), costs.errors.numpy(), kv_sizes(decoder)
    results = []
    for unit in units:
        rng = np.random.default_rng(seed)
        factors = mean_factors * (1 + rng.normal(size=(num_draws, len(errors))) * errors).clip(min=0)
        draws = [
            strategy.cost(GateCostSamples(gate, prompt, row, factors, unit=unit, rng=rng, **sizes))
            for prompt, row in zip(features, quantiles, strict=True)
        ]
        results.append(Forecast(unit, np.stack(draws)))
    return results


async def _read_prompts(decoder: Decoder, prompts: Sequence[IntArray], *, wants_hidden: bool) -> list[PromptFeatures]:
    features: list[PromptFeatures] = []
    for begin in range(0, len(prompts), _PROMPTS_AT_A_TIME):
        batch = list(prompts[begin : begin + _PROMPTS_AT_A_TIME])
        with await decoder.roots(batch) as root:
            features += await prompt_features(root, wants_hidden=wants_hidden)
    return features
