"""RotaryTable: cosines and sines of a rotary embedding by position, computed once."""

from typing import Any

import torch
from torch import Tensor

from treedecode.models.fast_forward import require_own_forward
from treedecode.models.fast_modules import UnsupportedModule

# Rotations by angles that depend on a token's position alone. Those of "dynamic" and "longrope" depend on the longest
# position of a forward too.
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_BLOCK = 1024  # positions


class RotaryTable:
    """Looks up what a rotary embedding of Transformers computes.

    A decode step has few rows, whose angles cost more than their lookup. The trigonometric functions of torch also wake
    its threads, which then spin while those of `ops.decoder_forward` work.
    """

    def __init__(self, rotary: Any, dtype: torch.dtype) -> None:
        """Keeps the module, which computes the table as far as positions come.

        Raises:
            UnsupportedModule: the angles may depend on more than the position.
        """
        require_own_forward(rotary)
        rope_type = getattr(rotary, "rope_type", None)
        if rope_type not in _FIXED_ROPE_TYPES:
            raise UnsupportedModule(f"rotary embedding of type {rope_type!r}")
        self._rotary = rotary
        self._dtype = dtype
        self._cos, self._sin = self._compute(0, _BLOCK)

    def _compute(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(begin, end, device="cpu")
        with torch.inference_mode():
            cos, sin = self._rotary(torch.empty(0, dtype=self._dtype, device="cpu"), position_ids=positions[None])
        return cos[0], sin[0]

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines `[n, head_dim]` of positions `[n]` int64."""
        num_needed, num_computed = int(position_ids.max()) + 1 if len(position_ids) else 0, len(self._cos)
        if num_needed > num_computed:
            cos, sin = self._compute(num_computed, max(2 * num_computed, -(-num_needed // _BLOCK) * _BLOCK))
            self._cos, self._sin = torch.cat([self._cos, cos]), torch.cat([self._sin, sin])
        return self._cos.index_select(0, position_ids), self._sin.index_select(0, position_ids)
