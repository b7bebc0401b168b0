"""Chain of thought, with budget forcing (2501.19393: s1, simple test-time scaling)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from treedecode.common.validation import int_in
from treedecode.decoding.frontier import Frontier
from treedecode.engine.sampling import Sampling
from treedecode.search.search import Outcome, Search
from treedecode.search.strategy import CostSamples, Strategy


@dataclass(frozen=True)
class ChainOfThought(Strategy):
    """One chain. Below `min_tokens` its end is replaced by `wait`; at `max_tokens` `answer_prompt` forces an answer.

    Args:
        min_tokens: a chain that ends earlier is made to go on, even where its text has come to an answer; 0 = never.
        wait: the text that makes it go on ("Wait" in the paper).
        max_waits: how often at most.
        max_tokens: where thinking is cut and the answer forced; None = at the task's own limit, without forcing.
        answer_prompt: the text that forces the answer.
        answer_tokens: limits the forced answer.
        sampling: in place of the run's.
    """

    name: ClassVar[str] = "chain_of_thought"

    min_tokens: int = 0
    wait: str = "Wait"
    max_waits: int = 8
    max_tokens: int | None = None
    answer_prompt: str = "\nFinal Answer:"
    answer_tokens: int = 32
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        int_in("min_tokens", self.min_tokens, 0)
        int_in("max_waits", self.max_waits, 0)
        int_in("answer_tokens", self.answer_tokens, 1)
        if self.max_tokens is not None:
            int_in("max_tokens", self.max_tokens, max(1, self.min_tokens))

    @property
    def num_branches(self) -> int:
        return 2

    def cost(self, samples: CostSamples) -> np.ndarray:
        if self.min_tokens or self.max_tokens is not None:
            return super().cost(samples)
        return samples.chains(1)

    async def solve(self, search: Search) -> Outcome:
        limit = search.task.max_new_tokens if self.max_tokens is None else self.max_tokens
        if self.min_tokens > limit:
            raise ValueError(f"min_tokens: expected at most {limit}, all that the task allows, got {self.min_tokens}")
        forces = self.max_tokens is not None
        answer = self._encode(search, self.answer_prompt) if forces else []
        wait = self._encode(search, self.wait) if self.min_tokens else []
        chain = await search.root()
        room, reserve = int(search.room(chain)[0]), len(answer) + 1 if forces else 0
        limit = min(limit, room - reserve if room > reserve else room)
        await self._think(search, chain, limit)
        for _ in range(self.max_waits):
            if self._length(chain) >= self.min_tokens or limit - self._length(chain) <= len(wait):
                break
            # the chain goes on, even if its text has come to an answer
            chain = self._append(without_end(search, chain), wait)
            await self._think(search, chain, limit)
        if forces and not search.final(chain).all() and search.room(chain)[0] > len(answer):
            self._append(chain, answer)
            await chain.extend(stop=search.task.stop, max_new_tokens=self.answer_tokens, sampling=self.sampling)
            text = chain.texts()[0]
            return Outcome(search.task.extract(text), text, node=int(chain.nodes[0]))
        return search.outcome(chain, 0)

    async def _think(self, search: Search, chain: Frontier, limit: int) -> None:
        """Lets the chain go on until its text ends or it has `limit` tokens."""
        if (remaining := limit - self._length(chain)) > 0:
            stop = list(search.task.end) or None
            await chain.extend(stop=stop, max_new_tokens=remaining, sampling=self.sampling)

    def _encode(self, search: Search, text: str) -> list[int]:
        return search.decoder.encode(text, special=False) if text else []

    def _append(self, chain: Frontier, tokens: list[int]) -> Frontier:
        return chain.append(tokens) if tokens else chain

    def _length(self, chain: Frontier) -> int:
        return int((chain.num_tokens - chain.num_prompt_tokens)[0])


def without_end(search: Search, chain: Frontier) -> Frontier:
    """Cuts off the token that ended a chain: its end of sequence, or the last token of its end string."""
    last = np.array([ids[-1] for ids in chain.token_ids()])
    has_end = [text.endswith(search.task.end) for text in chain.texts()]
    num_cut = np.isin(last, search.decoder.model.eos_token_ids) | has_end
    shorter = chain.fork_at(np.maximum(chain.num_tokens - num_cut, chain.num_prompt_tokens))
    chain.release()
    return shorter
