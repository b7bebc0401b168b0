"""Draws of what a strategy will cost on a problem, from what the gate knows of its prompt."""

import numpy as np

from treedecode.allocation.chain_costs import kv_tokens, shared_tokens
from treedecode.allocation.cost_quantiles import LEVELS
from treedecode.allocation.features import Prefill
from treedecode.allocation.gate import Gate


class CostDraws:
    """Ways one problem may go, for `Strategy.cost`.

    Args:
        quantiles: `[num_targets, len(LEVELS)]` of log(1 + cost), as the gate tells them.
        factors: `[num_draws, num_targets]` on costs, those of all problems of a draw.
    """

    def __init__(
        self,
        gate: Gate,
        prompt: Prefill,
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
        """`[num_draws]`, of so many chains side by side, which read the prompt's pages together."""
        tokens = self._draw(0, count)
        if self.unit == "tokens":
            return tokens.sum(axis=1)
        prompt = self._prompt.num_tokens
        shared = shared_tokens(prompt, self._page_size)
        read = shared * tokens.max(axis=1) + kv_tokens(prompt - shared, tokens).sum(axis=1)
        return self._token_bytes * (read + prompt - 1)

    def one_chain(self, count: int) -> np.ndarray:
        """`[num_draws]`, of one chain alone: the mean of so many."""
        tokens = self._draw(0, count)
        if self.unit == "tokens":
            return tokens.mean(axis=1)
        return self._token_bytes * kv_tokens(self._prompt.num_tokens, tokens).mean(axis=1)

    def tree(self, depth: int, width: int, keep: int) -> np.ndarray:
        """`[num_draws]`, of a search of the gate's menu.

        Raises:
            ValueError: it is not there.
        """
        menu = [item.shape for item in self._gate.config.menu]
        if (depth, width, keep) not in menu:
            known = ", ".join(map(str, menu)) or "none"
            raise ValueError(
                f"strategy: the gate has seen no tree search with depth, width and keep ({depth}, {width}, {keep}), so "
                f"it cannot tell its cost; of those it has seen there are: {known}"
            )
        found = self._draw(1 + 2 * menu.index((depth, width, keep)) + (self.unit == "kv_bytes"), 1)[:, 0]
        return found * self._token_bytes if self.unit == "kv_bytes" else found

    def _draw(self, target: int, count: int) -> np.ndarray:
        """`[num_draws, count]`: linear between the quantiles, constant beyond the outer ones."""
        levels = self._rng.random((len(self._factors), count))
        return np.expm1(np.interp(levels, LEVELS, self._quantiles[target])) * self._factors[:, target, None]
