"""Scores branches and compares answers."""

import importlib
from typing import TYPE_CHECKING, Any

from treedecode.tasks.answers import classes, equivalence_backend, equivalent, extract_answer
from treedecode.verify.judges import Judge, Vote, value_judge
from treedecode.verify.scorers import Likelihood, Scorer, TextScorer, as_scorer

if TYPE_CHECKING:
    from treedecode.verify.reward_model import RewardModel as RewardModel
    from treedecode.verify.value import Value as Value

_LAZY = {"RewardModel": "treedecode.verify.reward_model", "Value": "treedecode.verify.value"}  # these need torch

__all__ = [
    "Judge",
    "Likelihood",
    "RewardModel",
    "Scorer",
    "TextScorer",
    "Value",
    "Vote",
    "as_scorer",
    "classes",
    "equivalence_backend",
    "equivalent",
    "extract_answer",
    "value_judge",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'treedecode.verify' has no attribute {name!r}")
