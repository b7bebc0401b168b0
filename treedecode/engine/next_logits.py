"""NextLogits: logits that a forward has already computed for the token after a row's last."""

from typing import NamedTuple

import torch
from torch import Tensor

from treedecode.common.arrays import IntArray


class LogitsRow(NamedTuple):
    """One row of the logits of a forward."""

    logits: Tensor  # [n, vocab_size], of the whole forward
    position: int  # of the row in it


class NextLogits:
    """Logits by row of the branch table, each valid for as long as the row keeps its number of tokens.

    A forward for hidden states computes logits too; the `extend` that follows samples from them.
    """

    def __init__(self) -> None:
        self._rows: dict[int, tuple[LogitsRow, int]] = {}  # and the number of tokens the row had

    def put(self, row: int, logits: LogitsRow, num_tokens: int) -> None:
        """Keeps the logits of a row of `num_tokens` tokens."""
        self._rows[row] = logits, num_tokens

    def pop(self, row: int, num_tokens: int) -> LogitsRow | None:
        """Gives up the logits of a row: None if there are none for `num_tokens` tokens."""
        logits, length = self._rows.pop(row, (None, -1))
        return logits if length == num_tokens else None

    def fork(self, parents: IntArray, children: IntArray) -> None:
        """Children continue from the logits of their parents."""
        if self._rows:
            for parent, child in zip(parents.tolist(), children.tolist(), strict=True):
                if parent in self._rows:
                    self._rows[child] = self._rows[parent]

    def drop(self, rows: IntArray) -> None:
        """Forgets the logits of rows that hold other tokens now."""
        if self._rows:
            for row in rows.tolist():
                self._rows.pop(row, None)

    def clear(self) -> None:
        """Forgets all logits."""
        self._rows.clear()


def gather(rows: list[LogitsRow]) -> tuple[Tensor, list[int]]:
    """Puts rows of several forwards into one tensor.

    Returns:
        logits `[n, vocab_size]`, grouped by forward, and for each of their rows its index in `rows`.
    """
    by_forward: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_forward.setdefault(id(row.logits), []).append(i)
    parts = []
    for members in by_forward.values():
        logits = rows[members[0]].logits
        positions = torch.tensor([rows[i].position for i in members], device=logits.device)
        parts.append(logits.index_select(0, positions))
    return torch.cat(parts), [i for members in by_forward.values() for i in members]
