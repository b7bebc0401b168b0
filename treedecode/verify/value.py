"""Value: scores branches by a value head on the decoder's own hidden states, without a further forward."""

import asyncio
import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from treedecode.decoding.frontier import Frontier
from treedecode.models.adapter import ModelAdapter, require_hidden_states
from treedecode.models.value_head import ValueHead
from treedecode.tasks.base import Problem

_Waiting = list[tuple[Tensor, asyncio.Future[np.ndarray]]]


class Value:
    """Scores a branch by P(a solution sampled on from here is right), from the hidden state of its last token.

    The forward that gives the hidden states also gives the logits of the next tokens, so that a branch and its children
    need one forward less when they go on. Frontiers that wait for the same forward are scored in one evaluation of the
    head.

    Args:
        head: a `ValueHead` for the decoder's model, or the file of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no value head.
    """

    probability = True

    def __init__(self, head: ValueHead | str | os.PathLike[str]) -> None:
        self.head = head if isinstance(head, ValueHead) else ValueHead.load(head)
        self._waiting: dict[asyncio.AbstractEventLoop, _Waiting] = {}
        self._fast: tuple[list[int], Callable[[Tensor], Tensor]] | None = None  # of these versions of the weights

    def __repr__(self) -> str:
        """Names the head by its weights, wherever they are kept, since journals compare runs by it."""
        weights = hashlib.blake2b(digest_size=8)
        for tensor in self.head.state_dict().values():
            weights.update(tensor.float().numpy(force=True).tobytes())
        return f"Value({weights.hexdigest()})"

    def check(self, model: ModelAdapter) -> None:
        """Checks that a model fits the head; called before a run begins.

        Raises:
            ValueError: the model gives no hidden states, or the head was trained for those of another size.
        """
        require_hidden_states(model)
        if model.hidden_size != self.head.hidden_size:
            raise ValueError(
                f"verifier: the value head reads hidden states of {self.head.hidden_size}, and those of this model "
                f"have {model.hidden_size}"
            )

    async def __call__(self, frontier: Frontier, problem: Problem) -> np.ndarray:
        """Scores the branches: `[n]` float64 in [0, 1].

        Raises:
            ValueError: the head was trained for another hidden size.
        """
        hidden = await frontier.hidden()
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, [])
        future: asyncio.Future[np.ndarray] = loop.create_future()
        waiting.append((hidden, future))
        if len(waiting) == 1:
            loop.call_soon(self._evaluate, loop)
        frontier.scores = await future
        return frontier.scores

    def _evaluate(self, loop: asyncio.AbstractEventLoop) -> None:
        """Scores all frontiers that wait in an event loop."""
        waiting = [(hidden, future) for hidden, future in self._waiting.pop(loop) if not future.done()]
        if not waiting:
            return
        try:
            values = self._values(torch.cat([hidden for hidden, _ in waiting]))
        except Exception as error:
            for _, future in waiting:
                future.set_exception(error)
            return
        ends = np.cumsum([len(hidden) for hidden, _ in waiting])
        for (_, future), part in zip(waiting, np.split(values, ends[:-1]), strict=True):
            future.set_result(part)

    def _values(self, hidden: Tensor) -> np.ndarray:
        if next(self.head.parameters()).device != hidden.device:
            self.head.to(hidden.device)
        versions = [parameter._version for parameter in self.head.parameters()]
        if self._fast is None or self._fast[0] != versions:
            self._fast = versions, self.head.fast()
        with torch.inference_mode():
            return self._fast[1](hidden).double().numpy(force=True)
