"""A value head on the decoder's own hidden states: scores of branches at the price of no forward."""

import hashlib
import os

import numpy as np
import torch

from treedecode.models.value_head import ValueHead
from treedecode.tasks.base import Problem
from treedecode.tree import Frontier


class Value:
    """P(a solution sampled on from here is right), read off the hidden state of each branch's last token.

    The forward that gives the hidden states gives the logits of the next tokens too, so a branch, or its children, that
    go on from here need one forward less.

    Args:
        head: a `ValueHead` for the decoder's model, or the file one was saved in.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or holds no value head.
    """

    probability = True

    def __init__(self, head: ValueHead | str | os.PathLike[str]) -> None:
        self.head = head if isinstance(head, ValueHead) else ValueHead.load(head)

    def __repr__(self) -> str:
        """Tells heads apart by their weights, wherever they are kept: journals ask whether a run is the same."""
        weights = hashlib.blake2b(digest_size=8)
        for tensor in self.head.state_dict().values():
            weights.update(tensor.float().numpy(force=True).tobytes())
        return f"Value({weights.hexdigest()})"

    async def __call__(self, frontier: Frontier, problem: Problem) -> np.ndarray:
        """Sets and returns the scores of a frontier's branches, `[n]` float64 in [0, 1].

        Raises:
            ValueError: the head was trained for another hidden size.
        """
        hidden = await frontier.hidden()
        if next(self.head.parameters()).device != hidden.device:
            self.head.to(hidden.device)
        with torch.inference_mode():
            frontier.scores = self.head(hidden).double().numpy(force=True)
        return frontier.scores
