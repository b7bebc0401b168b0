"""Samples of the cost of a strategy on one problem, from a gate that has read its prompt."""

import numpy as np

from treedecode.allocation.chain_costs import kv_tokens, shared_tokens
from treedecode.allocation.cost_quantiles import LEVELS
from treedecode.allocation.features import PromptFeatures
from treedecode.allocation.gate import Gate
from treedecode.search.strategy import CostSamples


class GateCostSamples(CostSamples):
    """Samples costs of chains and tree searches from the quantiles that a gate predicts for a prompt.

    Args:
        quantiles: `[num_targets, len(LEVELS)]` of log(1 + cost), as the gate predicts them.
        factors: `[num_samples, num_targets]` on costs, the same for all problems of a sample.
        token_bytes, page_size: of the decoder's cache.
    """

    def __init__(
        self,
        gate: Gate,
        prompt: PromptFeatures,
        quantiles: np.ndarray,
        factors: np.ndarray,
        *,
        unit: str,
        token_bytes: int,
        page_size: int,
        rng: np.random.Generator,
    ) -> None:
        self.unit = unit
        self._gate, self._prompt, self._quantiles, self._factors = gate, prompt, quantiles, factors
        self._token_bytes, self._page_size, self._rng = token_bytes, page_size, rng

    def chains(self, count: int) -> np.ndarray:
        """Samples costs `[num_samples]` of chains side by side, which read the prompt's pages together."""
        tokens = self._sample(0, count)
        if self.unit == "tokens":
            return tokens.sum(axis=1)
        prompt = self._prompt.num_tokens
        shared = shared_tokens(prompt, self._page_size)
        read = shared * tokens.max(axis=1) + kv_tokens(prompt - shared, tokens).sum(axis=1)
        return self._token_bytes * (read + prompt - 1)

    def one_chain(self, count: int) -> np.ndarray:
        """Samples costs `[num_samples]` of a chain that shares nothing, each the mean of `count` chains."""
        tokens = self._sample(0, count)
        if self.unit == "tokens":
            return tokens.mean(axis=1)
        return self._token_bytes * kv_tokens(self._prompt.num_tokens, tokens).mean(axis=1)

    def tree(self, depth: int, width: int, keep: int) -> np.ndarray:
        """Samples costs `[num_samples]` of a tree search of the gate's menu.

        Raises:
            ValueError: the menu has no search of this shape.
        """
        menu = [item.shape for item in self._gate.config.menu]
        if (depth, width, keep) not in menu:
            shapes = ", ".join(map(str, menu)) or "none"
            raise ValueError(
                f"strategy: the gate has seen no tree search with depth, width and keep ({depth}, {width}, {keep}), so "
                f"it cannot tell its cost; of those it has seen there are: {shapes}"
            )
        target = 1 + 2 * menu.index((depth, width, keep)) + (self.unit == "kv_bytes")
        costs = self._sample(target, 1)[:, 0]
        return costs * self._token_bytes if self.unit == "kv_bytes" else costs

    def _sample(self, target: int, count: int) -> np.ndarray:
        """`[num_samples, count]` costs: linear between the quantiles, constant beyond the outer ones."""
        levels = self._rng.random((len(self._factors), count))
        return np.expm1(np.interp(levels, LEVELS, self._quantiles[target])) * self._factors[:, target, None]
