"""Diverse verifier tree search (Beeching, Tunstall and Rush 2024: Scaling test-time compute with open models)."""

from dataclasses import dataclass
from typing import ClassVar

from treedecode.strategies.step_beam_search import StepBeamSearch


@dataclass(frozen=True)
class DVTS(StepBeamSearch):
    """Searches `num_beams / width` independent trees, and follows the best of `width` next steps in each.

    Settings are those of `StepBeamSearch`; the answer is chosen among the solutions of all trees. A tree ends when all
    of its steps have become complete solutions.
    """

    name: ClassVar[str] = "dvts"

    @property
    def num_trees(self) -> int:
        return self.num_beams // self.width
